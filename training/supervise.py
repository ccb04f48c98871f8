"""Train a vision transformer on few labelled lesions: more to learn from every picture.

A label is one bit a picture, far too little for a transformer with fresh weights. So three more
heads learn beside it, on the same tokens, and are thrown away afterwards: where the lesion is
(each patch's share of the mask), which diagnosis it has, which dermoscopic structures experts saw.
They also pull the attention to the lesion, away from the camera's traces at the border. What a
batch shows is in `training.views`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dermaflux.prompt import DIAGNOSES, LABELS, STRUCTURES
from training import data, states
from training.classifier import Recipe, build, normalized
from training.views import UNKNOWN, Targets, augment, views

log = logging.getLogger(__name__)

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


def _losses(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor], targets: Targets, rows: Tensor,
    masks: Tensor, recipe: Recipe,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(the whole loss, the label's alone)."""
    logits, diagnoses, structures, patches = (output.float() for output in outputs)
    label = F.cross_entropy(logits, targets.label[rows], label_smoothing=recipe.label_smoothing)
    total = label
    if (targets.diagnosis[rows] != UNKNOWN).any():
        total = total + recipe.diagnosis_loss * F.cross_entropy(
            diagnoses, targets.diagnosis[rows], ignore_index=UNKNOWN
        )
    wanted = targets.structures[rows]
    if (known := wanted != UNKNOWN).any():
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


_FREE = ("hours", "threads", "save_minutes")  # of a recipe, which a resumed run may change


def _recipe(recipe: Recipe) -> dict[str, Any]:
    return {name: value for name, value in asdict(recipe).items() if name not in _FREE}


def _begun(file: Path) -> states.History:
    """The history of another run that its state file holds."""
    with states.reading(file, "give --start a state that training.vit saved with --work") as state:
        return states.History.of(state["history"])


def _same_run(state: Mapping[str, Any], file: Path, mine: states.History, recipe: Recipe) -> None:
    """Refuse to go on with a run that read other data, began elsewhere, or has another recipe."""
    before = states.History.of(state["history"])
    advice = "give --work another file to begin a new run"
    if before.data != mine.data:
        names = ["; ".join(f"{s} ({licence})" for s, licence in h.data) for h in (before, mine)]
        raise data.DatasetError(
            f"{file} is a run on other data: it read {names[0]}, not {names[1]}; {advice}"
        )
    if mine.start is not None and mine.start != before.start:
        starts = [
            "random weights" if h.start is None else f"{h.start.name} at step {h.start.steps}"
            for h in (before, mine)
        ]
        raise data.DatasetError(
            f"{file} is a run that began from {starts[0]}, not from {starts[1]} as --start says; "
            f"leave --start out, or {advice}"
        )
    now = _recipe(recipe)
    if other := [n for n in now if state["recipe"].get(n) != now[n]]:
        said = ", ".join(f"{n} {state['recipe'].get(n)!r} instead of {now[n]!r}" for n in other)
        raise data.DatasetError(f"{file} is a run of another recipe ({said}); {advice}")


def check(
    samples: list[data.Sample], recipe: Recipe, state_file: Path | None, start: Path | None
) -> states.History:
    """The history with which `train` would begin or go on, without reading any picture.

    Raises:
        DatasetError: a state file cannot be read, or the one to resume is of another run.
    """
    name = "a run without --work" if state_file is None else state_file.name
    begun = None if start is None else _begun(start)
    history = states.History(name, tuple(data.licences(samples)), start=begun)
    if state_file is None or not state_file.is_file():
        return history
    with states.reading(state_file, "delete it, or give --work another file") as state:
        _same_run(state, state_file, history, recipe)
        return replace(states.History.of(state["history"]), name=name)


def train(
    samples: list[data.Sample], recipe: Recipe, state_file: Path | None = None,
    start: Path | None = None,
) -> tuple[nn.Module, states.History]:  # fmt: skip
    """Train for `recipe.hours` of wall-clock, or resume; the averaged model in eval mode.

    With `state_file`, the run is saved there every `recipe.save_minutes` and taken up again. A new
    run begins with the averaged weights of `start`, another run's state file. The history says what
    the weights have seen, that of `start` included.

    Raises:
        DatasetError: `start` is no such file, or one of another architecture; `state_file` is of
            other data, another recipe or another start.
    """
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    history = check(samples, recipe, state_file, start)
    resumed = state_file is not None and state_file.is_file()
    model, average = Supervised(recipe), Supervised(recipe)
    if start is not None and not resumed:
        with states.reading(start, "give --start a run of the same architecture") as state:
            model.load_state_dict(state["average"])
    average.load_state_dict(model.state_dict())
    average.requires_grad_(False)
    optimizers = _optimizers(model, recipe)
    step, seconds, losses = history.steps, history.seconds, list[float]()
    if state_file is not None and resumed:
        with states.reading(state_file, "delete it, or give --work another file") as state:
            model.load_state_dict(state["model"])
            average.load_state_dict(state["average"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            losses = [float(loss) for loss in state["losses"]]
        torch.manual_seed(recipe.seed + step)
        log.info("resumed %s at step %d, %.0f s in", state_file, step, seconds)

    def now() -> states.History:
        return replace(history, steps=step, seconds=seconds)

    def save() -> None:
        if state_file is not None:
            states.write(state_file, {
                "model": model.state_dict(), "average": average.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "losses": losses, "recipe": _recipe(recipe), "history": now().state(),
            })  # fmt: skip

    budget = recipe.hours * 3600
    if seconds >= budget:
        return average.vit.eval(), now()
    kept = recipe.size + recipe.margin
    images = torch.from_numpy(data.load_images(samples, kept)).permute(0, 3, 1, 2).contiguous()
    targets = Targets.of(samples, kept)
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
    return average.vit.eval(), now()
