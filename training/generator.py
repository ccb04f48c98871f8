"""Train the embedded default's generator by flow matching, then distil guidance.

Two phases. In the first, captions are dropped now and then and the guidance embedding stands at 1,
so that one network predicts velocity with and without its text. In the second the text encoders
are frozen and a student, started from the first phase's average, learns for any guidance w of
`GUIDANCE_RANGE` to give in one forward what the teacher gives in two (`guided`): guidance
distilled into the embedding, as in FLUX.1-dev (Meng et al., arXiv 2210.03142). Both phases save
every few minutes and resume.

On the CPU, two single-threaded processes that average their gradients are faster than one process
of two threads, and far faster where something else wants the cores.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, T5EncoderModel

from training import bf16, states
from training.words import clip_encoder, t5_encoder, token_ids

log = logging.getLogger(__name__)

GUIDANCE_RANGE = (1.0, 6.0)
PARALLEL = 0.0
RESUME = "delete it to train this stage again, or give another --work"


@dataclass(frozen=True)
class Architecture:
    """Sizes of the generator; the defaults are those of the embedded default (9.2 M + 0.9 M)."""

    double_layers: int = 2
    single_layers: int = 4
    heads: int = 4
    head_width: int = 64
    rope_axes: tuple[int, int, int] = (16, 24, 24)
    text_width: int = 128
    text_layers: int = 2
    text_length: int = 64
    vocabulary: int = 640
    latent_channels: int = 16


MUON, ADAMW = OPTIMIZERS = "muon", "adamw"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train. The wall-clock bounds the run, so that it ends as planned."""

    hours: float = 1.5  # of phase one
    distill_hours: float = 0.2  # of phase two
    batch: int = 64  # over all processes; Muon costs a quarter of a step of 32
    optimizer: str = MUON  # beside AdamW for what is no matrix; slow where bfloat16 is emulated
    rate: float = 1e-3  # Muon's (scaled to AdamW's update size) and AdamW's
    warmup: int = 100  # optimizer steps
    decay: float = 0.3  # last share of a phase over which the rate falls linearly to zero
    ema: float = 0.999
    drop_text: float = 0.1
    seed: int = 0
    save_minutes: float = 4.0
    processes: int = 2  # one core each: a step then waits for the slower one once, not per operator


class Generator(nn.Module):
    """The three trained networks of a Flux pipeline, and nothing else."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * a.latent_channels,
            num_layers=a.double_layers,
            num_single_layers=a.single_layers,
            attention_head_dim=a.head_width,
            num_attention_heads=a.heads,
            joint_attention_dim=a.text_width,
            pooled_projection_dim=a.text_width,
            guidance_embeds=True,
            axes_dims_rope=a.rope_axes,
        )
        self.clip: CLIPTextModel = clip_encoder(
            a.text_width, a.text_layers, a.vocabulary, a.text_length
        )
        self.t5: T5EncoderModel = t5_encoder(a.text_width, a.text_layers, a.vocabulary)

    def encode(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [N, L] twice -> hidden states [N, L, text] and pooled [N, text]."""
        hidden = self.t5(input_ids=t5_ids).last_hidden_state
        return hidden, self.clip(input_ids=clip_ids).pooler_output


@dataclass
class Texts:
    """Token ids of every caption of every sample: `clip[sample, variant]` is one caption's ids."""

    clip: Tensor  # int64 [samples, variants, L]
    t5: Tensor
    empty_clip: Tensor  # int64 [L]
    empty_t5: Tensor

    @classmethod
    def of(cls, captions: list[list[str]], clip: Tokenizer, t5: Tokenizer) -> Texts:
        """Tokenize `captions[sample][variant]`; every sample has as many variants."""
        flat = [text for variants in captions for text in variants]
        shape = (len(captions), len(captions[0]), -1)
        return cls(
            token_ids(clip, flat).reshape(shape),
            token_ids(t5, flat).reshape(shape),
            token_ids(clip, [""])[0],
            token_ids(t5, [""])[0],
        )


@dataclass
class Corpus:
    """What the generator sees.

    Attributes:
        latents: float16 [samples, orientations, tokens, 64], packed.
        ids: float32 [tokens, 3], the image ids of one picture.
        texts: captions of the samples.
        weights: float [samples], how often a sample is drawn.
    """

    latents: Tensor
    ids: Tensor
    texts: Texts
    weights: Tensor

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Endless (latents [N, tokens, 64], clip ids, t5 ids)."""
        random = torch.Generator().manual_seed(seed)
        while True:
            rows = torch.multinomial(self.weights, size, replacement=True, generator=random)
            turn = torch.randint(self.latents.shape[1], (size,), generator=random)
            variant = torch.randint(self.texts.clip.shape[1], (size,), generator=random)
            yield (
                self.latents[rows, turn].float(),
                self.texts.clip[rows, variant],
                self.texts.t5[rows, variant],
            )


@dataclass
class _Run:
    """Everything a phase saves and resumes."""

    model: nn.Module
    average: nn.Module
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def save(self, file: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
        }
        states.write(file, state)

    def resume(self, file: Path) -> None:
        if not file.is_file():
            return
        with states.reading(file, RESUME) as state:
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.seconds, self.losses = (
                state[name] for name in ("step", "seconds", "losses")
            )
        log.info("resumed %s at step %d, %.0f s in", file, self.step, self.seconds)


def _optimizers(
    model: Generator | FluxTransformer2DModel, plan: Schedule
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer's blocks, if asked for; AdamW for all the rest.

    Muon's update is scaled to AdamW's size (Liu et al., arXiv 2502.16982): one rate does for both.
    """
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = plan.optimizer == MUON and "transformer_blocks" in name and parameter.ndim == 2
        (matrices if inside and "norm" not in name else rest).append(parameter)
    made: list[torch.optim.Optimizer] = []
    if matrices:
        made.append(
            torch.optim.Muon(
                matrices, lr=plan.rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"
            )
        )
    return [*made, torch.optim.AdamW(rest, lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.0)]


def _average_gradients(parameters: list[nn.Parameter], seconds: float) -> float:
    """Average gradients over the processes; returns the first process's `seconds` to all."""
    if not dist.is_initialized():
        return seconds
    gradients = [p.grad for p in parameters if p.grad is not None]
    clock = torch.tensor([seconds * dist.get_world_size() if dist.get_rank() == 0 else 0.0])
    flat = torch.cat([g.flatten() for g in gradients] + [clock])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(
        gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True
    ):
        gradient.copy_(mean.view_as(gradient))
    return float(flat[-1])


def _first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _share(plan: Schedule) -> tuple[int, int]:
    """This process's batch size and its own seed offset; seeds the process's noise."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    return plan.batch // world, 1_000_003 * rank


def _train(
    run: _Run, hours: float, plan: Schedule, file: Path, loss_of: Callable[[], Tensor]
) -> None:
    """Optimize until `hours` of wall-clock are spent, saving on the way."""
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    started, saved = time.monotonic() - run.seconds, time.monotonic()
    progress = tqdm(
        total=round(hours * 3600), initial=round(run.seconds), unit="s", desc=file.stem,
        disable=not _first(),
    )  # fmt: skip
    while run.seconds < hours * 3600:
        left = 1 - run.seconds / (hours * 3600)
        rate = plan.rate * min(1.0, (run.step + 1) / plan.warmup, left / plan.decay)
        loss = loss_of()
        loss.backward()
        run.seconds = _average_gradients(parameters, time.monotonic() - started)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        run.step += 1
        run.losses.append(float(loss.detach()))
        decay = min(plan.ema, (1 + run.step) / (10 + run.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(run.average.parameters()), list(run.model.parameters()), 1 - decay
            )
        progress.update(round(run.seconds) - progress.n)
        if run.step % 25 == 0:
            progress.set_postfix(step=run.step, loss=f"{np.mean(run.losses[-100:]):.4f}")
        if _first() and time.monotonic() - saved > plan.save_minutes * 60:
            run.save(file)
            saved = time.monotonic()
            log.info("step %d loss %.4f", run.step, np.mean(run.losses[-200:]))
    if _first():
        run.save(file)
    progress.close()


def train(corpus: Corpus, architecture: Architecture, plan: Schedule, folder: Path) -> Generator:
    """Phase one; returns the average. State goes to `folder/generator.pt`."""
    torch.manual_seed(plan.seed)
    model, average = Generator(architecture), Generator(architecture)
    average.load_state_dict(model.state_dict())
    average.requires_grad_(False)
    run = _Run(model, average, _optimizers(model, plan))
    run.resume(folder / "generator.pt")
    size, offset = _share(plan)
    torch.manual_seed(plan.seed + run.step + offset)
    batches = corpus.batches(size, plan.seed + run.step + offset)
    text_ids = torch.zeros(architecture.text_length, 3)
    ones = torch.ones(size)

    def loss_of() -> Tensor:
        clean, clip_ids, t5_ids = next(batches)
        dropped = torch.rand(size) < plan.drop_text
        clip_ids = torch.where(dropped[:, None], corpus.texts.empty_clip, clip_ids)
        t5_ids = torch.where(dropped[:, None], corpus.texts.empty_t5, t5_ids)
        noise = torch.randn_like(clean)
        # Logit-normal times (Esser et al., arXiv 2403.03206), mean 0 and deviation 1.
        sigma = torch.randn(size).sigmoid()
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        with bf16.autocast():
            hidden, pooled = model.encode(clip_ids, t5_ids)
            velocity = model.transformer(
                hidden_states=noisy,
                encoder_hidden_states=hidden,
                pooled_projections=pooled,
                timestep=sigma,
                img_ids=corpus.ids,
                txt_ids=text_ids,
                guidance=ones,
                return_dict=False,
            )[0]
        loss: Tensor = (velocity.float() - (noise - clean)).square().mean()
        return loss

    _train(run, plan.hours, plan, folder / "generator.pt", loss_of)
    return average


def guided(teacher: Generator, hidden: Tensor, pooled: Tensor, noisy: Tensor, sigma: Tensor,
           weight: Tensor, corpus_ids: Tensor, empty: tuple[Tensor, Tensor],
           parallel: float = PARALLEL) -> Tensor:  # fmt: skip
    """Adaptive projected guidance by two forwards in one batch: velocity [N, tokens, 64].

    Plain guidance, v(empty) + w (v(text) - v(empty)), mostly raises the contrast of what is already
    there: skin burns to white. What of the difference is parallel to the picture predicted from
    `noisy` counts by `parallel` only (Sadat et al., arXiv 2410.02416; its momentum, which has no
    place in one forward, and its rescaling of the difference's norm are left out). At weight 1 it
    is the velocity with the text.
    """
    count = len(noisy)
    nothing_hidden = empty[0].expand(count, -1, -1)
    nothing_pooled = empty[1].expand(count, -1)
    both = teacher.transformer(
        hidden_states=torch.cat([noisy, noisy]),
        encoder_hidden_states=torch.cat([hidden, nothing_hidden]),
        pooled_projections=torch.cat([pooled, nothing_pooled]),
        timestep=torch.cat([sigma, sigma]),
        img_ids=corpus_ids,
        txt_ids=torch.zeros(hidden.shape[1], 3),
        guidance=torch.ones(2 * count),
        return_dict=False,
    )[0].float()
    with_text, without = both.chunk(2)
    picture = noisy - sigma[:, None, None] * with_text
    difference = with_text - without
    along = (difference * picture).sum((1, 2)) / picture.square().sum((1, 2)).clamp_min(1e-8)
    change = difference - (1 - parallel) * along[:, None, None] * picture
    velocity: Tensor = with_text + (weight - 1)[:, None, None] * change
    return velocity


def distil(teacher: Generator, corpus: Corpus, architecture: Architecture, plan: Schedule,
           folder: Path) -> Generator:  # fmt: skip
    """Phase two; returns a generator with the teacher's text encoders and the student's average."""
    student, average = Generator(architecture), Generator(architecture)
    for model in (student, average):
        model.load_state_dict(teacher.state_dict())
    average.requires_grad_(False)
    run = _Run(student.transformer, average.transformer, _optimizers(student.transformer, plan))
    run.resume(folder / "distilled.pt")
    size, offset = _share(plan)
    torch.manual_seed(plan.seed + run.step + offset + 1)
    batches = corpus.batches(size, plan.seed + run.step + offset + 1)
    text_ids = torch.zeros(architecture.text_length, 3)
    with torch.no_grad():
        empty = teacher.encode(corpus.texts.empty_clip[None], corpus.texts.empty_t5[None])
    low, high = GUIDANCE_RANGE

    def loss_of() -> Tensor:
        clean, clip_ids, t5_ids = next(batches)
        noise = torch.randn_like(clean)
        sigma = torch.randn(size).sigmoid()
        weight = low + (high - low) * torch.rand(size)
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        with bf16.autocast():
            with torch.no_grad():
                hidden, pooled = teacher.encode(clip_ids, t5_ids)
                wanted = guided(teacher, hidden, pooled, noisy, sigma, weight, corpus.ids, empty)
            velocity = student.transformer(
                hidden_states=noisy,
                encoder_hidden_states=hidden,
                pooled_projections=pooled,
                timestep=sigma,
                img_ids=corpus.ids,
                txt_ids=text_ids,
                guidance=weight,
                return_dict=False,
            )[0]
        loss: Tensor = (velocity.float() - wanted).square().mean()
        return loss

    _train(run, plan.distill_hours, plan, folder / "distilled.pt", loss_of)
    return average
