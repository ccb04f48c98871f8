"""Train a vision transformer on few labelled lesions: more to learn from every picture.

A label is one bit a picture, far too little for a transformer with fresh weights. So three more
heads learn beside it, on the same tokens, and are thrown away afterwards: where the lesion is
(each patch's share of the mask), which diagnosis it has, which dermoscopic structures experts saw.
They also pull the attention to the lesion, away from the camera's traces at the border. Pictures
are turned by any angle, cropped (often to the lesion), and lit differently; all of that is one
affine grid and one colour matrix a batch.
"""

from __future__ import annotations

import logging
import math
import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dermaflux.prompt import DIAGNOSES, LABELS, STRUCTURES
from training import data
from training.classifier import Recipe, build, normalized

log = logging.getLogger(__name__)

_UNKNOWN = -1  # a target that is not known: no loss
_BENIGN_ONLY = 0.3  # how much less a group counts whose camera never saw a malignant lesion


def draw_weights(samples: list[data.Sample]) -> Tensor:
    """float64 [N]: a group (source, confirmed, label) is drawn by the square root of its size.

    Full balance would show the few consensus images hundreds of times; the root is the usual
    middle. Groups in which all are benign (follow-up, consensus) come from cameras of their own, so
    they count less: they teach the camera. Half of all draws are malignant.
    """
    groups = [(s.source, s.confirmed, str(s.lesion.label)) for s in samples]
    sizes = {group: groups.count(group) for group in set(groups)}
    mixed = {group[:2] for group in sizes if group[2] == "malignant"}
    mass = {g: n**0.5 * (1.0 if g[:2] in mixed else _BENIGN_ONLY) for g, n in sizes.items()}
    labels = {label: sum(m for g, m in mass.items() if g[2] == label) for label in LABELS}
    return torch.tensor([mass[g] / sizes[g] / labels[g[2]] for g in groups], dtype=torch.float64)


@dataclass(frozen=True)
class Targets:
    """What is known of every sample; -1 where it is not.

    Attributes:
        label: int64 [N]. diagnosis: int64 [N]. structures: float32 [N, 5].
        mask: uint8 [N, S, S], 255 inside of the lesion, and 0 everywhere where none is known.
        masked: bool [N], whether there is a mask.
        box: float32 [N, 3], the lesion's centre (x, y, -1..1) and half side; (0, 0, 1) without.
    """

    label: Tensor
    diagnosis: Tensor
    structures: Tensor
    mask: Tensor
    masked: Tensor
    box: Tensor

    @classmethod
    def of(cls, samples: list[data.Sample], size: int) -> Targets:
        """Read the masks at `size` pixels a side; structures are known where a source has any."""
        diagnoses, masks, boxes = list(DIAGNOSES), [], []
        rated = {s.source for s in samples if s.lesion.structures}
        for sample in samples:
            mask = data.load_mask(sample, size)
            masks.append(np.zeros((size, size), bool) if mask is None else mask)
            boxes.append(_box(masks[-1]))
        return cls(
            label=torch.tensor([LABELS.index(str(s.lesion.label)) for s in samples]),
            diagnosis=torch.tensor(
                [diagnoses.index(d) if (d := s.lesion.diagnosis) else _UNKNOWN for s in samples]
            ),
            structures=torch.tensor(
                [
                    [float(w in s.lesion.structures) if s.source in rated else _UNKNOWN
                     for w in STRUCTURES]
                    for s in samples
                ]
            ),
            mask=torch.from_numpy(np.stack(masks).astype(np.uint8) * 255),
            masked=torch.tensor([bool(m.any()) for m in masks]),
            box=torch.tensor(boxes, dtype=torch.float32),
        )  # fmt: skip


def _box(mask: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> tuple[float, float, float]:
    if not mask.any():
        return 0.0, 0.0, 1.0
    size = mask.shape[0]
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    centre = [(axis[0] + axis[-1] + 1) / size - 1 for axis in (columns, rows)]
    half = max(axis[-1] - axis[0] + 1 for axis in (rows, columns)) / size
    return float(centre[0]), float(centre[1]), float(half)


class Supervised(nn.Module):
    """A timm vision transformer with the auxiliary heads on its tokens."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.vit = build(recipe)
        vit: Any = self.vit  # timm's own methods are not in nn.Module's type
        width = int(vit.num_features)
        self.mask = nn.Linear(width, 1)
        self.diagnosis = nn.Linear(width, len(DIAGNOSES))
        self.structures = nn.Linear(width, len(STRUCTURES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[N, 3, S, S] -> logits [N, 2], diagnoses [N, 10], structures [N, 5], mask [N, patches].

        The tokens have to be prefix tokens and a square of patches, as a plain ViT's are.
        """
        vit: Any = self.vit
        tokens = vit.forward_features(images)
        pooled = vit.forward_head(tokens, pre_logits=True)
        patches = tokens[:, vit.num_prefix_tokens :]
        return (
            vit.get_classifier()(pooled),
            self.diagnosis(pooled),
            self.structures(pooled),
            self.mask(patches).squeeze(-1),
        )


def views(targets: Targets, rows: Tensor, recipe: Recipe) -> Tensor:
    """A random affine view of each of `rows`: theta [N, 2, 3] for `affine_grid`."""
    count = len(rows)
    side = (0.4 + 0.6 * torch.rand(count)).sqrt()
    centre = (2 * torch.rand(count, 2) - 1) * (1 - side)[:, None]
    zoomed = targets.masked[rows] & (torch.rand(count) < recipe.zoom)
    box = targets.box[rows]
    side = torch.where(zoomed, (box[:, 2] * (1.0 + 0.8 * torch.rand(count))).clamp(0.2, 1.0), side)
    centre = torch.where(
        zoomed[:, None], box[:, :2] + 0.2 * (torch.rand(count, 2) - 0.5) * side[:, None], centre
    )
    quarter = torch.randint(4, (count,)) * (math.pi / 2)
    angle = torch.where(torch.rand(count) < 0.5, torch.rand(count) * 2 * math.pi, quarter)
    stretch = torch.exp(0.12 * (2 * torch.rand(count) - 1))
    flip = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    scale = torch.diag_embed(torch.stack([side * stretch * flip, side / stretch], 1))
    return torch.cat([turn @ scale, centre[:, :, None]], dim=2)


def lights(count: int) -> Tensor:
    """Random colour maps [N, 3, 4]: white balance, brightness, contrast and saturation."""
    gain = torch.exp(0.12 * torch.randn(count, 1, 1) + 0.06 * torch.randn(count, 3, 1))
    contrast = 1 + 0.25 * (2 * torch.rand(count, 1, 1) - 1)
    saturation = 1 + 0.3 * (2 * torch.rand(count, 1, 1) - 1)
    grey = torch.tensor([0.299, 0.587, 0.114]).expand(3, 3)
    matrix = gain * contrast * (saturation * torch.eye(3) + (1 - saturation) * grey)
    return torch.cat([matrix, (0.6 * (1 - contrast)).expand(-1, 3, 1)], dim=2)


def augment(images: Tensor, masks: Tensor, theta: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """uint8 [N, 3, S', S'] and [N, S', S'] -> pictures [N, 3, size, size] in 0..1, and masks."""
    grid = F.affine_grid(theta, [len(images), 4, size, size], align_corners=False)
    both = torch.cat([images, masks[:, None]], dim=1).float() / 255
    seen = F.grid_sample(both, grid, padding_mode="reflection", align_corners=False)
    light = lights(len(images))
    pixels = torch.einsum("nij,njhw->nihw", light[:, :, :3], seen[:, :3])
    return (pixels + light[:, :, 3:, None]).clamp(0, 1), seen[:, 3]


def _losses(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor], targets: Targets, rows: Tensor,
    masks: Tensor, recipe: Recipe,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(the whole loss, the label's alone)."""
    logits, diagnoses, structures, patches = (output.float() for output in outputs)
    label = F.cross_entropy(logits, targets.label[rows], label_smoothing=recipe.label_smoothing)
    total = label
    if (targets.diagnosis[rows] != _UNKNOWN).any():
        total = total + recipe.diagnosis_loss * F.cross_entropy(
            diagnoses, targets.diagnosis[rows], ignore_index=_UNKNOWN
        )
    wanted = targets.structures[rows]
    if (known := wanted != _UNKNOWN).any():
        total = total + recipe.structure_loss * F.binary_cross_entropy_with_logits(
            structures[known], wanted[known]
        )
    if (masked := targets.masked[rows]).any():
        side = math.isqrt(patches.shape[1])
        share = F.adaptive_avg_pool2d(masks[:, None], side).flatten(1)
        total = total + recipe.mask_loss * F.binary_cross_entropy_with_logits(
            patches[masked], share[masked]
        )
    return total, label


def _optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest, at one rate, as in the generator."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if "blocks." in name and parameter.ndim == 2 else rest).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=recipe.rate, weight_decay=recipe.weight_decay)
    ]
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices, lr=recipe.rate, weight_decay=recipe.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )  # fmt: skip
    return optimizers


def _draws(weights: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        yield torch.multinomial(weights, size, replacement=True)


def train(
    samples: list[data.Sample], recipe: Recipe, state_file: Path | None = None,
    start: Path | None = None,
) -> nn.Module:  # fmt: skip
    """Train for `recipe.hours` of wall-clock, or resume; returns the averaged model in eval mode.

    With `state_file`, the run is saved there every `recipe.save_minutes` and taken up again. A new
    run begins with the averaged weights of `start`, another run's state file.

    Raises:
        DatasetError: `start` is no such file, or one of another architecture.
    """
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    kept = recipe.size + recipe.margin
    images = torch.from_numpy(data.load_images(samples, kept)).permute(0, 3, 1, 2).contiguous()
    targets = Targets.of(samples, kept)
    model, average = Supervised(recipe), Supervised(recipe)
    if start is not None:
        try:
            model.load_state_dict(torch.load(start, weights_only=True)["average"])
        except (OSError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
            raise data.DatasetError(f"{start} holds no run to start from: {error}") from error
    average.load_state_dict(model.state_dict())
    average.requires_grad_(False)
    optimizers = _optimizers(model, recipe)
    step, seconds, losses = 0, 0.0, list[float]()
    if state_file is not None and state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seconds, losses = state["step"], state["seconds"], state["losses"]
        torch.manual_seed(recipe.seed + step)
        log.info("resumed %s at step %d, %.0f s in", state_file, step, seconds)

    def save() -> None:
        if state_file is None:
            return
        state_file.parent.mkdir(parents=True, exist_ok=True)
        state = {"model": model.state_dict(), "average": average.state_dict(),
                 "optimizers": [o.state_dict() for o in optimizers],
                 "step": step, "seconds": seconds, "losses": losses}  # fmt: skip
        torch.save(state, state_file.with_suffix(".part"))
        state_file.with_suffix(".part").replace(state_file)

    budget = recipe.hours * 3600
    started, saved_at = time.monotonic() - seconds, time.monotonic()
    draws = _draws(draw_weights(samples), recipe.batch)
    with tqdm(total=round(budget), initial=round(seconds), unit="s", desc="vit") as bar:
        while seconds < budget:
            left = 1 - seconds / budget
            rows = next(draws)
            theta = views(targets, rows, recipe)
            pictures, masks = augment(images[rows], targets.mask[rows], theta, recipe.size)
            with torch.autocast("cpu", torch.bfloat16):
                outputs = model(normalized(pictures))
            loss, label_loss = _losses(outputs, targets, rows, masks, recipe)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = recipe.rate * min(1.0, (step + 1) / 50, left / 0.7)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            decay = min(recipe.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(average.parameters()), list(model.parameters()), 1 - decay
                )
            losses.append(float(label_loss.detach()))
            seconds = time.monotonic() - started
            bar.update(round(seconds) - bar.n)
            if step % 25 == 0:
                bar.set_postfix(step=step, loss=f"{np.mean(losses[-100:]):.4f}")
            if time.monotonic() - saved_at > recipe.save_minutes * 60:
                save()
                saved_at = time.monotonic()
    save()
    log.info("%d steps of %d images, loss %.4f", step, recipe.batch, np.mean(losses[-100:]))
    return average.vit.eval()
