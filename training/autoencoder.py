"""Teach an AutoencoderKL to read and write a given latent space.

The latents are a fixed linear map of the picture (`training.latents`), so decoder and encoder learn
by regression, side by side and without an adversary: the decoder to draw the picture from slightly
noisy latents (those of a sampler are never exact), the encoder to give the latents' mean and its
own error as variance.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from training import bf16, states
from training.latents import Basis, orientations

log = logging.getLogger(__name__)

# FLUX.1's own; any pair would do, since the encoder learns to give latents on this scale.
SCALING, SHIFT = 0.3611, 0.1159


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train; the wall-clock bounds the run."""

    hours: float = 0.3
    batch: int = 8
    rate: float = 2e-3
    warmup: int = 100
    ema: float = 0.998
    noise: float = 0.05
    seed: int = 0
    save_minutes: float = 3.0
    channels: tuple[int, ...] = (16, 32, 64, 128)


def build(channels: tuple[int, ...] = Plan.channels, latent_channels: int = 16) -> AutoencoderKL:
    """An AutoencoderKL of f8 with fresh weights, 2.8 M parameters by default."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=SCALING,
        shift_factor=SHIFT,
        sample_size=128,
    )


def _edges(image: Tensor) -> tuple[Tensor, Tensor]:
    return image[..., 1:, :] - image[..., :-1, :], image[..., :, 1:] - image[..., :, :-1]


def _loss(model: AutoencoderKL, images: Tensor, latents: Tensor, noise: float) -> Tensor:
    raw = latents / SCALING + SHIFT
    drawn = model.decode((latents + noise * torch.randn_like(latents)) / SCALING + SHIFT).sample
    drawn = drawn.float()
    picture = F.l1_loss(drawn, images) + F.mse_loss(drawn, images)
    sharp = sum(F.l1_loss(a, b) for a, b in zip(_edges(drawn), _edges(images), strict=True))
    mean, spread = model.encoder(images).float().chunk(2, dim=1)
    spread = spread.clamp(-8, 2)
    likelihood = 0.5 * (spread + (mean - raw).square() * (-spread).exp()).mean()
    total: Tensor = picture + sharp + 0.05 * likelihood
    return total


def train(images: NDArray[np.uint8], basis: Basis, plan: Plan, file: Path) -> AutoencoderKL:
    """Train on [N, S, S, 3] pictures in all orientations, or resume; returns the average."""
    torch.manual_seed(plan.seed)
    model, average = build(plan.channels), build(plan.channels)
    average.load_state_dict(model.state_dict())
    average.requires_grad_(False)
    model, average = (m.to(memory_format=torch.channels_last) for m in (model, average))
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.rate, betas=(0.9, 0.99))
    step, seconds = 0, 0.0
    if file.is_file():
        with states.reading(file, "delete it to train this stage again") as state:
            model.load_state_dict(state["model"])
            average.load_state_dict(state["average"])
            optimizer.load_state_dict(state["optimizer"])
            step, seconds = state["step"], state["seconds"]
    random = np.random.default_rng(plan.seed + step)
    turned = orientations(images)
    started, saved = time.monotonic() - seconds, time.monotonic()

    def save() -> None:
        state = {"model": model.state_dict(), "average": average.state_dict(),
                 "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}  # fmt: skip
        states.write(file, state)

    losses: list[float] = []
    with tqdm(total=round(plan.hours * 3600), initial=round(seconds), unit="s", desc="vae") as bar:
        while seconds < plan.hours * 3600:
            rows = random.integers(len(images), size=plan.batch)
            turns = random.integers(len(turned), size=plan.batch)
            pixels = np.stack([turned[t][r] for r, t in zip(rows, turns, strict=True)])
            latents = torch.from_numpy(basis.encode(pixels))
            target = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
            left = 1 - seconds / (plan.hours * 3600)
            for group in optimizer.param_groups:
                group["lr"] = plan.rate * min(1.0, (step + 1) / plan.warmup, left / 0.6)
            with bf16.autocast():
                loss = _loss(model, target, latents, plan.noise)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            losses.append(float(loss.detach()))
            decay = min(plan.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(average.parameters()), list(model.parameters()), 1 - decay
                )
            seconds = time.monotonic() - started
            bar.update(round(seconds) - bar.n)
            if step % 25 == 0:
                bar.set_postfix(step=step, loss=f"{np.mean(losses[-50:]):.4f}")
            if time.monotonic() - saved > plan.save_minutes * 60:
                save()
                saved = time.monotonic()
    save()
    return average


@torch.no_grad()
def psnr(model: AutoencoderKL, images: NDArray[np.uint8], *, encode: bool, basis: Basis) -> float:
    """Mean PSNR in dB of 8-bit reconstructions; from the encoder's mean or the exact latents."""
    values = []
    for start in range(0, len(images), 16):
        batch = images[start : start + 16]
        target = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 127.5 - 1
        exact = torch.from_numpy(basis.encode(batch)) / SCALING + SHIFT
        raw = model.encode(target).latent_dist.mean if encode else exact
        drawn = model.decode(raw).sample.clamp(-1, 1)
        error = (drawn - target).square().mean(dim=(1, 2, 3))
        values += (10 * torch.log10(4 / error)).tolist()
    return float(np.mean(values))
