"""A LoRA run: caches, then steps, with states, previews and a journal; resumed where it stopped.

    >>> result = run(settings)
    >>> result.status, result.report["loss"]
    (0, 0.61)

Every process of `accelerate launch` draws the same global batch and takes its own part of it, so
the loss curve does not depend on their number but for rounding. A step's decisions (stop, save) are
shared with the loss in one reduction.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from accelerate import Accelerator  # type: ignore[import-untyped, unused-ignore]
from PIL import Image
from torch import nn

from dermaflux import files
from dermaflux.engines import eager
from dermaflux.errors import Cancelled, DermaFluxError
from training import states
from training.lora import objective, optimizers, state
from training.lora.base import Base
from training.lora.draws import Batch, Draws
from training.lora.feed import Feed
from training.lora.guard import locked, signals
from training.lora.journal import Journal, peak_bytes
from training.lora.layers import parameters
from training.lora.prepare import Place, prepare
from training.lora.preview import Previews, sheet
from training.lora.results import ADAPTER, SEEN, is_written, write_adapter, write_seen
from training.lora.settings import Settings, SettingsError, write
from training.lora.spread import Spread
from training.lora.state import STATE, StateError, whole
from training.lora.trainee import Trainee

log = logging.getLogger(__name__)

_LOSS_SCALE: Final = 1024.0
"""Of float16, whose smallest gradients would be 0 else."""


class Diverged(DermaFluxError):
    """The loss or its gradient is no number."""

    exit_status = 3


@dataclass(frozen=True)
class Result:
    """How a run ended: its exit status (143 or 130 where a signal stopped it) and its report."""

    status: int
    report: Mapping[str, Any]


def run(settings: Settings) -> Result:
    """Train, or go on; see `Settings`.

    Raises:
        DermaFluxError: of the base, the data, the settings, the device, the disk; or the loss is no
            number.
    """
    named = eager.torch_device(settings.device) if settings.device else None
    if settings.threads:
        torch.set_num_threads(settings.threads)
    # Told so, accelerate joins CPU processes too; else each would think itself alone.
    accelerator = Accelerator(cpu=settings.device == "cpu" or not torch.cuda.is_available())
    device = named or accelerator.device
    settings.out.mkdir(parents=True, exist_ok=True)
    with signals() as got, locked(settings.out, accelerator.is_main_process):
        place = Place(
            accelerator.process_index, accelerator.num_processes, device, lambda: bool(got),
            accelerator.wait_for_everyone,
        )  # fmt: skip
        try:
            report = _Run(settings, place).go()
        except Cancelled as error:
            log.info("%s", error)
            report = {"out": str(settings.out), "stopped": True}
        # Where another process was told to stop, this one was not.
        told = got[0] if got else int(signal.SIGTERM)
        return Result(128 + told if report["stopped"] else 0, report)


class _Run:
    """Everything that a run's steps share; `go` is its story."""

    def __init__(self, settings: Settings, place: Place) -> None:
        self.settings, self.place = settings, place
        self.share = _share(settings, place.world)
        self.sharded = _sharded(settings)
        self.file = settings.out / STATE
        self.base = Base.open(settings)
        optimizers.require(settings, on_gpu=place.device.type == "cuda")
        self.data = prepare(settings, self.base, place)
        before = self._saved()
        self.trainee = Trainee.make(self.base, settings, place.device)
        self.spread = Spread.of(self.trainee, place.device, sharded=self.sharded)
        self.named = parameters(self.trainee.layers)
        self.optimizer = optimizers.make(settings, list(self.named.values()))
        kept = self.named if settings.ema else {}
        self.average = {name: value.detach().clone() for name, value in kept.items()}
        self.feed = Feed(settings, self.base, self.data, place.device)
        self.draws = Draws(
            self.data.items, seed=settings.seed, batch=settings.batch, turns=settings.turns,
            dropout=settings.caption_dropout,
        )  # fmt: skip
        self.step, self.speed = 0, 0.0
        self.loss: float | None = None
        if before is not None:
            self._load(before)

    def go(self) -> dict[str, Any]:
        """All steps that are left, and the adapter; the report."""
        settings, place, data = self.settings, self.place, self.data
        if place.first:
            with state.saving("the run's settings", settings.out / "settings.json", settings.out):
                files.write(settings.out / "settings.json", write(settings))
            with state.saving("what is trained on", settings.out / SEEN, settings.out):
                write_seen(settings.out, data)
        finished = self.step == settings.steps
        if finished:
            log.info("all %d steps are done already; more --steps go on from there", self.step)
        stopped = False if finished else self._train()
        values, adapter = whole(self.average or dict(self.named)), None
        if place.first and not stopped:
            adapter = settings.out / ADAPTER
            # A finished run's adapter may be published: its bytes stay as they are.
            if not finished or not is_written(adapter, self.step):
                layers = self.trainee.layers
                write_adapter(
                    settings, self.base, data, layers, values, step=self.step, loss=self.loss
                )
        return {
            "out": str(settings.out),
            "adapter": str(adapter) if adapter else None,
            "steps": self.step,
            "loss": self.loss,
            "samples_per_s": round(self.speed, 4),
            "peak_bytes": peak_bytes(place.device),
            "pictures": len(data.items),
            "left_out": data.left_out,
            "stopped": stopped,
        }

    def _train(self) -> bool:
        """The steps that are left, told of; whether a signal ended them early."""
        settings, place, previews = self.settings, self.place, None
        if settings.prompts and (place.first or self.sharded):
            previews = Previews(self.base, settings, self.data.texts, self.data.side, place.device)
        with Journal(
            settings.out, step=self.step, steps=settings.steps, batch=settings.batch,
            device=place.device, quiet=not place.first,
        ) as journal:  # fmt: skip
            stopped = self._steps(journal, previews)
            self.speed = journal.samples_per_s
        return stopped

    def _steps(self, journal: Journal, previews: Previews | None) -> bool:
        """Train until the end; whether a signal ended it early."""
        settings, saved_at, saved_step = self.settings, time.monotonic(), self.step
        while self.step < settings.steps:
            journal.begin()
            rate = optimizers.rate(self.step, settings)
            optimizers.set_rate(self.optimizer, rate)
            loss, norm = self._gradients(self.draws.batch(self.step))
            due = time.monotonic() - saved_at > settings.save_minutes * 60
            loss, stop, save = self._agree(loss, self.place.stop(), due)
            if not math.isfinite(loss) or not math.isfinite(norm):
                kept = f"{self.file} has step {saved_step}" if saved_step else "nothing was saved"
                raise Diverged(
                    f"step {self.step + 1}: the loss is {loss} and its gradient's norm {norm}; "
                    f"{kept}. Lower --rate (now {rate:.3g}), or leave --base-dtype fp16"
                )
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self._follow()
            journal.tell(self.step, loss=loss, rate=rate, norm=norm)
            self.loss = journal.last["loss"]
            last = self.step == settings.steps
            if stop or save or last:
                self._save()
                saved_at, saved_step = time.monotonic(), self.step
            if stop and not last:
                log.info("stopped at step %d; the same command goes on", self.step)
                return True
            if previews is not None and (last or self.step % settings.preview_steps == 0):
                self._preview(previews, journal)
        return False

    def _gradients(self, batch: Batch) -> tuple[float, float]:
        """Those of the whole batch, clipped; this process's mean loss and the gradient's norm."""
        micro = self.settings.micro or self.share
        scale = _LOSS_SCALE if self.trainee.dtype == torch.float16 else 1.0
        begin, end = self.place.index * self.share, (self.place.index + 1) * self.share
        total = torch.zeros((), device=self.place.device)
        for start in range(begin, end, micro):
            shown = self.feed.at(self.step, batch, range(start, start + micro))
            with self.spread.alone() if start + micro < end else nullcontext():
                velocity = self.spread.model(
                    shown.noisy, shown.share, grid=shown.grid, **shown.text
                )
                each = objective.losses(velocity, shown.clean, shown.noise)
                (each.mean() * (micro / self.share * scale)).backward()
            total += each.detach().sum() / self.share
        values = list(self.named.values())
        if scale != 1.0:
            torch._foreach_div_([v.grad for v in values if v.grad is not None], scale)
        norm = nn.utils.clip_grad_norm_(values, self.settings.clip)
        return float(total), float(whole(norm))

    def _agree(self, loss: float, stop: bool, save: bool) -> tuple[float, bool, bool]:
        """The mean loss, whether anybody was told to stop, and whether the first is due to save."""
        if self.place.world == 1:
            return loss, stop, save
        values = [loss / self.place.world, float(stop), float(save and self.place.first)]
        told = torch.tensor(values, device=self.place.device, dtype=torch.float64)
        dist.all_reduce(told)
        return float(told[0]), bool(told[1]), bool(told[2])

    @torch.no_grad()
    def _follow(self) -> None:
        """The average follows; sooner at the start (as in `training.generator`)."""
        if self.average:
            decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
            now = [parameter.detach() for parameter in self.named.values()]
            torch._foreach_lerp_(list(self.average.values()), now, 1 - decay)

    def _preview(self, previews: Previews, journal: Journal) -> None:
        """Drawn with the average, where there is one, as the adapter will be."""
        kept = {name: value.detach().clone() for name, value in self.named.items()}
        with torch.no_grad():
            for name, value in self.average.items():
                self.named[name].copy_(value)
            drawn = list(previews.draw(self.trainee))
            for name, before in kept.items():
                self.named[name].copy_(before)
        if self.place.first:
            for number, (prompt, image) in enumerate(drawn):
                journal.show(self.step, f"{number}: {prompt[:60]}", image)
            file = self.settings.out / "previews" / f"{self.step:07}.png"
            with state.saving(f"step {self.step}", file, self.settings.out):
                file.parent.mkdir(exist_ok=True)
                Image.fromarray(sheet([image for _, image in drawn])).save(file)

    def _saved(self) -> dict[str, Any] | None:
        """The state to go on from. Raises StateError where it is another run's, or is beyond all
        steps that are wanted."""
        if not self.file.exists():
            return None
        with states.reading(self.file, state.RESUME) as found:
            state.require_same(self.file, found["identity"], self.data.identity)
            if int(found["step"]) > self.settings.steps:
                raise StateError(
                    f"{self.file} has step {found['step']} already, and --steps is "
                    f"{self.settings.steps}; give --steps {found['step']} or more, or another --out"
                )
        return found

    def _load(self, before: Mapping[str, Any]) -> None:
        with states.reading(self.file, state.RESUME), torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(state.like(before["weights"][name], parameter))
                if self.average:
                    self.average[name].copy_(state.like(before["average"][name], parameter))
            values = list(self.named.values())
            state.load_optimizer(self.optimizer, before["optimizer"], values)
            self.draws.counters = [list(map(int, counts)) for counts in before["counters"]]
            self.step = int(before["step"])
            self.loss = before.get("loss")
        log.info("resumed %s at step %d", self.file, self.step)

    def _save(self) -> None:
        """The first process writes; a failure ends all. Raises StateError."""
        content = {
            "identity": self.data.identity,
            "step": self.step,
            "loss": self.loss,
            "weights": whole(dict(self.named)),
            "average": whole(self.average),
            "optimizer": whole(self.optimizer.state_dict()),
            "counters": self.draws.counters,
        }
        failed: StateError | None = None
        if self.place.first:
            try:
                state.write(self.file, content)
            except StateError as error:
                failed = error
        if self.place.world > 1:
            told = torch.tensor(float(failed is not None), device=self.place.device)
            dist.all_reduce(told)
            if told and failed is None:
                failed = StateError(f"{self.file} could not be written by the first process")
        if failed is not None:
            raise failed


def _share(settings: Settings, world: int) -> int:
    """Pictures of a step that one process sees."""
    share, rest = divmod(settings.batch, world)
    if rest or (settings.micro and share % settings.micro):
        micro = f" times --micro {settings.micro}" if settings.micro else ""
        raise SettingsError(
            f"--batch {settings.batch} is not a multiple of {world} processes{micro}"
        )
    return share


def _sharded(settings: Settings) -> bool:
    """Whether the model is cut into shards, as --shard or accelerate's configuration says."""
    wanted = settings.shard or os.environ.get("ACCELERATE_USE_FSDP", "") == "true"
    if wanted and settings.base_dtype in ("fp8", "4bit"):
        raise SettingsError(
            f"a base in {settings.base_dtype} cannot be sharded; use --base-dtype bf16, or copies "
            "(no --shard)"
        )
    if wanted and not dist.is_initialized():
        raise SettingsError("--shard needs processes: accelerate launch -m training.lora ...")
    return wanted
