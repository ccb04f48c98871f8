"""Train a timm classifier on labelled lesions, alone or in several processes.

    >>> recipe = Recipe(steps=400, size=64, model_args={"img_size": 64, "patch_size": 8, ...})
    >>> model, history = fit(train, recipe, pictures=cache)
    >>> classifier.logits_of(model, cache.images(test, recipe.whole))

What a batch shows is in `training.draws` and `training.views`, what it costs in `training.heads`,
what is saved in `training.resuming`.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dermaflux.prompt import LABELS
from training import classifier, data, draws, resuming, states
from training.heads import Mixed, Supervised, losses
from training.optimizing import factor, optimizers_of, set_rate
from training.pictures import Pictures
from training.pretrained import Pretrained
from training.ranks import Ranks, batch_normalised, parts_of
from training.recipe import Recipe, RecipeError
from training.resuming import Progress
from training.targets import Targets
from training.views import Views, augment, views

log = logging.getLogger(__name__)


def fit(
    samples: Sequence[data.Sample], recipe: Recipe, validation: Sequence[data.Sample] = (), *,
    pictures: Pictures | None = None, weights: Pretrained | None = None,
    state_file: Path | None = None, start: Path | None = None,
) -> tuple[nn.Module, states.History]:  # fmt: skip
    """Train to the recipe's budget, or resume; the averaged model on the CPU in eval mode.

    `validation` is looked at every `recipe.evaluate` steps. Pictures are taken from `pictures`, and
    read into it where it lacks them. With `state_file`, the run is saved there every
    `recipe.save_minutes` and taken up again. A new run begins with `weights`, or with the averaged
    weights of `start`, another run's state file. The history says what the weights saw, with what
    those that they began from saw. In several processes (`training.ranks`) all call this alike.
    The caller's random numbers stay as they were.

    Raises:
        DatasetError: `start` is no such file, or one of another architecture; `state_file` is of
            other data, another recipe or another start; a label is missing; a picture cannot be
            read; or `weights` do not fit.
        RecipeError: the model cannot be built, or the batch cannot be shared out.
    """
    for name, some in (("training", samples), ("validation", validation)):
        found = {str(sample.lesion.label) for sample in some}
        if (name == "training" or recipe.evaluate) and (lacking := set(LABELS) - found):
            raise data.DatasetError(f"the {name} pictures have no {min(lacking)} lesion")
    torch.set_num_threads(recipe.threads)
    history = resuming.check(samples, recipe, state_file, start, weights)
    cuda = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(cuda):
        torch.manual_seed(recipe.seed)
        resumed = state_file is not None and state_file.is_file()
        model = Supervised(recipe)
        if weights is not None and not resumed:
            weights.into(model.vit, recipe.architecture)
        if start is not None and not resumed:
            with states.reading(start, "give --start a run of the same architecture") as state:
                model.load_state_dict(state["average"])
        return _Run(list(samples), recipe, list(validation), pictures or Pictures(recipe.threads),
                    state_file, model, history).to_the_end()  # fmt: skip


@dataclass(frozen=True)
class _Shown:
    """The training pictures in memory: uint8 [N, S, S, 3], and what is known of them."""

    images: Tensor
    targets: Targets
    weights: Tensor

    @classmethod
    def of(cls, samples: list[data.Sample], recipe: Recipe, pictures: Pictures) -> _Shown:
        images = torch.from_numpy(pictures.images(samples, recipe.kept))
        targets = Targets.of(samples, recipe.kept, pictures)
        weights = draws.class_weights(samples, recipe.class_weights)
        return cls(images, targets, weights)


class _Run:
    """One training, from where `history` says that it is."""

    def __init__(
        self, samples: list[data.Sample], recipe: Recipe, validation: list[data.Sample],
        pictures: Pictures, state_file: Path | None, model: Supervised, history: states.History,
    ) -> None:  # fmt: skip
        self.samples, self.recipe, self.validation = samples, recipe, validation
        self.pictures, self.file, self.history = pictures, state_file, history
        self.ranks = Ranks.here(recipe.device)
        self.parts = parts_of(model, recipe, self.ranks)
        if self.parts > 1 and self.ranks.first and batch_normalised(model):
            log.warning(
                "%s has batch normalisation, which sees the %d pictures of a part at once and not "
                "the %d of a batch: it learns otherwise than in one part", recipe.architecture,
                recipe.batch // self.parts, recipe.batch,
            )  # fmt: skip
        model.to(self.ranks.device)
        average = copy.deepcopy(model).requires_grad_(False)
        self.now = Progress(model, average, optimizers_of(model, recipe))
        if state_file is not None and state_file.is_file():
            with states.reading(state_file, resuming.RESUME) as state:
                self.now.take(state)
            log.info("resumed %s at step %d, %.0f s in", state_file, history.steps, history.seconds)
        self.copies = self.ranks.copies(model)
        self.total = recipe.total(len(samples))

    def done(self) -> float:
        """The share of the budget that is spent."""
        if self.total is not None:
            return self.history.steps / self.total
        return self.history.seconds / (self.recipe.hours * 3600)

    def over(self) -> bool:
        patience = self.recipe.patience
        return self.done() >= 1 or (patience > 0 and self.now.since >= patience)

    def to_the_end(self) -> tuple[nn.Module, states.History]:
        if not self.over():
            self._steps()
            self.save()
            log.info("%d steps of %d images, loss %.4f", self.history.steps, self.recipe.batch,
                     self.history.loss or 0.0)  # fmt: skip
        result = self.now.average.vit
        if self.now.best is not None:
            result.load_state_dict(self.now.best)
        return result.eval().cpu(), self.history

    def save(self) -> None:
        if self.file is not None and self.ranks.first:
            resuming.written(self.file, self.now, self.recipe, self.history, self.samples)

    def _steps(self) -> None:
        recipe = self.recipe
        shown = _Shown.of(self.samples, recipe, self.pictures)
        drawn = draws.Draws(self.samples, recipe)
        started, saved_at = time.monotonic() - self.history.seconds, time.monotonic()
        self.now.model.train()
        self.now.average.eval()
        budget = self.total or round(recipe.hours * 3600)
        with tqdm(total=budget, unit="s" if self.total is None else "step", desc="vit",
                  disable=None if self.ranks.first else True) as bar:  # fmt: skip
            while not self.over():
                loss = self._step(shown, drawn)
                if not math.isfinite(loss):
                    raise RecipeError(
                        f"the loss of step {self.history.steps} is {loss}; give a lower --rate"
                    )
                self.now.losses.append(loss)
                seconds = time.monotonic() - started
                if self.total is None:
                    # Processes that ended after different steps would wait for each other.
                    seconds = self.ranks.told(seconds)
                self.history = replace(
                    self.history, steps=self.history.steps + 1, seconds=seconds,
                    loss=round(float(np.mean(self.now.losses[-100:])), 6),
                )  # fmt: skip
                if recipe.evaluate and (
                    self.history.steps % recipe.evaluate == 0 or self.done() >= 1
                ):
                    self._look()
                bar.update((self.history.steps if self.total else round(seconds)) - bar.n)
                if self.history.steps % 25 == 0:
                    bar.set_postfix(step=self.history.steps, loss=f"{self.history.loss:.4f}")
                if time.monotonic() - saved_at > recipe.save_minutes * 60:
                    self.save()
                    saved_at = time.monotonic()

    def _step(self, shown: _Shown, drawn: draws.Draws) -> float:
        """One step of the optimizers; the label's loss."""
        recipe, step, now = self.recipe, self.history.steps, self.now
        whole, box = drawn.mixed(step)
        seen = views(
            shown.targets, whole.pictures, recipe, draws.random(recipe.seed, draws.VIEWS, step)
        )
        size = recipe.batch // self.parts
        label = torch.zeros((), device=self.ranks.device)
        for part in range(recipe.accumulate):
            number = self.ranks.rank * recipe.accumulate + part
            place = slice(number * size, (number + 1) * size)
            # Drop path and dropout take from here: equal whatever process a part falls to.
            torch.manual_seed(draws.number(recipe.seed, draws.LAYERS, step, number))
            last = part == recipe.accumulate - 1
            waits = nullcontext() if last or self.ranks.world == 1 else self.copies.no_sync()
            with waits:
                total, one = self._loss(shown, whole, whole.part(place), seen, place, box)
                # Gradients are averaged over the processes, and these are shares of one sum.
                (total * self.ranks.world).backward()
            label += one.detach()
        nn.utils.clip_grad_norm_(now.model.parameters(), 1.0)
        for optimizer in now.optimizers:
            set_rate(optimizer, recipe.rate * factor(step, self.done(), recipe))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ranks.averaged_buffers(now.model)
        _follow(now.average, now.model, min(recipe.ema, (2 + step) / (11 + step)))
        return float(self.ranks.added(label))

    def _loss(
        self, shown: _Shown, whole: Mixed, batch: Mixed, seen: Views, place: slice,
        box: tuple[int, int, int, int] | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        recipe, device = self.recipe, self.ranks.device
        images = shown.images[batch.pictures].to(device).permute(0, 3, 1, 2)
        masks = shown.targets.mask[batch.pictures].to(device)
        pixels, masks = augment(images, masks, seen.part(place, device), recipe.size)
        pixels, masks = (draws.blended(one, batch.share, box) for one in (pixels, masks))
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            outputs = self.copies(classifier.normalized(pixels, self.now.model.vit))
        return losses(outputs, shown.targets, batch, whole, masks, recipe, shown.weights)

    def _look(self) -> None:
        """Hold the averaged weights against the validation pictures; keep them where best."""
        found = self.ranks.told(self._measured() if self.ranks.first else {})
        self.history = replace(self.history, validation=(*self.history.validation, found))
        value = found["loss"] if self.recipe.watch == "loss" else -found["auc"]
        self.now.since += 1
        if value < self.now.best_value:
            self.now.best_value, self.now.since = value, 0
            self.now.best = copy.deepcopy(self.now.average.vit.state_dict())
            self.history = replace(self.history, kept=self.history.steps)

    def _measured(self) -> dict[str, float]:
        images = self.pictures.images(self.validation, self.recipe.whole)
        logits = classifier.logits_of(self.now.average.vit, images)
        labels = np.array([LABELS.index(str(s.lesion.label)) for s in self.validation])
        costs = F.cross_entropy(
            torch.from_numpy(logits), torch.from_numpy(labels), reduction="none"
        ).numpy()
        # A training that balances labels does not know how many are malignant.
        balanced = self.recipe.sampling != "shuffled" or self.recipe.class_weights != "none"
        halves = [costs[labels == one].mean() for one in range(len(LABELS))]
        return {
            "step": self.history.steps,
            "loss": round(float(np.mean(halves if balanced else costs)), 6),
            "auc": round(float(roc_auc_score(labels, logits[:, 1] - logits[:, 0])), 6),
        }


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move averaged weights and running statistics towards the model's."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for mine, other in zip(average.buffers(), model.buffers(), strict=True):
        if mine.is_floating_point():
            mine.lerp_(other, 1 - decay)
        else:
            mine.copy_(other)
