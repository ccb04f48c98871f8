"""A LoRA run: caches, then steps, with states, previews and a journal; resumed where it stopped.

    >>> result = run(settings)
    >>> result.status, result.report["loss"]
    (0, 0.61)

Every process of `accelerate launch` draws the same global batch and takes its own part of it, so
the loss curve does not depend on their number but for rounding. A step's decisions (stop, save) are
shared with the loss in one reduction.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from accelerate import Accelerator  # type: ignore[import-untyped, unused-ignore]
from PIL import Image
from torch import Tensor, nn

from dermaflux import files
from dermaflux.errors import Cancelled, DatasetError, DermaFluxError
from dermaflux.flow import Schedule
from dermaflux.prompt import WORDING
from training import adapter, states
from training.lora import corpus, encode, objective, optimizers
from training.lora.base import DTYPES, Base
from training.lora.corpus import Item
from training.lora.draws import Batch, Draws, noise
from training.lora.journal import Journal, peak_bytes
from training.lora.layers import factors, parameters
from training.lora.preview import Previews, sheet
from training.lora.settings import LATER, Settings, SettingsError, write
from training.lora.spread import Spread
from training.lora.state import (
    RESUME,
    StateError,
    like,
    load_optimizer,
    require_same,
    whole,
)
from training.lora.state import write as write_state
from training.lora.store import Store
from training.lora.trainee import Trainee

log = logging.getLogger(__name__)

STATE: Final = "state.pt"
ADAPTER: Final = "adapter.safetensors"
_PAPER: Final = 512
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


@contextmanager
def signals() -> Iterator[list[int]]:
    """Within the block SIGTERM and SIGINT are noted in the list, and nothing else happens; a
    second one of a kind does what it did before."""
    got: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: Any) -> None:
        got.append(number)
        signal.signal(number, before[number])

    for number in map(int, (signal.SIGTERM, signal.SIGINT)):
        before[number] = signal.getsignal(number)
        signal.signal(number, note)
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(settings: Settings) -> Result:
    """Train, or go on; see `Settings`.

    Raises:
        DermaFluxError: of the base, the data, the settings, the disk; or the loss is no number.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    # Told so, accelerate joins CPU processes too; else each would think itself alone.
    accelerator = Accelerator(cpu=settings.device == "cpu" or not torch.cuda.is_available())
    device = torch.device(settings.device) if settings.device else accelerator.device
    settings.out.mkdir(parents=True, exist_ok=True)
    with signals() as got, _locked(settings.out, accelerator.is_main_process):
        try:
            return _Run(settings, accelerator, device, got).go()
        except Cancelled as error:
            log.info("%s", error)
            return Result(128 + got[0], {"stopped": True, "out": str(settings.out)})


@contextmanager
def _locked(folder: Path, first: bool) -> Iterator[None]:
    """Holds a folder for one run, until it ends however it ends."""
    with (folder / ".lock").open("w") as lock:
        if first:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StateError(
                    f"another run is writing to {folder}; give another --out"
                ) from None
        yield


class _Run:
    """Everything between a run's parts; `go` is its story."""

    def __init__(
        self, settings: Settings, accelerator: Accelerator, device: torch.device, got: list[int]
    ) -> None:
        self.settings, self.accelerator, self.device, self.got = settings, accelerator, device, got
        self.world, self.place = accelerator.num_processes, accelerator.process_index
        self.share = _share(settings, self.world)
        self.base = Base.open(settings)
        self.cache = settings.cache or settings.out / "cache"
        self.sizes = settings.sizes or (
            min(_PAPER, self.base.checkpoint.defaults.height, self.base.checkpoint.defaults.width),
        )
        token = 2 * self.base.checkpoint.model.scale
        self.buckets = corpus.buckets(self.sizes, settings.aspect, token)
        self.schedule = Schedule.from_config(self.base.checkpoint.scheduler)
        self.items: list[Item] = []
        self.latents = self.texts = None  # type: Store | None
        self.step = 0

    def go(self) -> Result:
        settings = self.settings
        self._prepare_data()
        self.identity = self._identity()
        file = settings.out / STATE
        state = self._saved(file)
        self.trainee = Trainee.make(self.base, settings, self.device)
        self.spread = Spread.of(self.trainee, self.device, sharded=self._sharded())
        self.named = parameters(self.trainee.layers)
        self.optimizer = optimizers.make(settings, list(self.named.values()))
        self.average = (
            {n: p.detach().clone() for n, p in self.named.items()} if settings.ema else {}
        )
        self.draws = Draws(
            self.items, seed=settings.seed, batch=settings.batch, turns=settings.turns,
            dropout=settings.caption_dropout,
        )  # fmt: skip
        if state is not None:
            self._load(file, state)
        elif self.place == 0:
            files.write(settings.out / "settings.json", write(settings))
            self._write_seen()
        previews = None
        if settings.prompts and (self.place == 0 or self.spread.sharded):
            previews = Previews(self.base, settings, self.texts, min(self.sizes), self.device)
        with Journal(
            settings.out, step=self.step, steps=settings.steps, batch=settings.batch,
            device=self.device, quiet=self.place > 0,
        ) as journal:  # fmt: skip
            stopped = self._steps(file, journal, previews)
            report = self._end(journal, stopped)
        return Result(128 + (self.got[0] if self.got else signal.SIGTERM) if stopped else 0, report)

    # Before the steps

    def _prepare_data(self) -> None:
        settings = self.settings
        items, broken = corpus.read(settings, self.buckets)
        dtype = self._encoder_dtype()
        place = (self.place, self.world)
        given: Any = {"device": self.device, "dtype": dtype, "stop": lambda: bool(self.got),
                      "share": place}  # fmt: skip
        self.latents, unread = encode.latents(
            items, self.base, self.cache, turns=settings.turns, **given
        )
        broken |= unread
        if not settings.text_encoders and not settings.keep_encoders:
            wanted = [*(item.text for item in items), "", *settings.prompts]
            self.texts = encode.texts(wanted, self.base, self.cache, **given)
        self.accelerator.wait_for_everyone()
        if self.world > 1:
            self.latents = Store(self.latents.folder)
            self.texts = Store(self.texts.folder) if self.texts is not None else None
        self.items = [
            item for item in items if encode.latent_key(item, settings.turns) in self.latents
        ]
        if not self.items:
            raise DatasetError(f"no picture is left to train on; {corpus.first(broken)}")
        if broken:
            log.warning("%d pictures are left out; first: %s", len(broken), corpus.first(broken))
            if self.place == 0:
                content = json.dumps(broken, indent=1, sort_keys=True)
                files.write(settings.out / "broken.json", content.encode())
        cut, looked = encode.too_long(self.items, self.base)
        if cut:
            length = self.base.checkpoint.model.text_length
            log.warning("%d of %d texts are longer than %d tokens and are cut", cut, looked, length)
        self.broken = len(broken)

    def _encoder_dtype(self) -> torch.dtype:
        if self.settings.base_dtype in DTYPES:
            return DTYPES[self.settings.base_dtype]
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def _identity(self) -> dict[str, Any]:
        """What makes the run what it is: a state of another one is refused."""
        known = self.settings.document()
        for name in (*LATER, "base", "encoders", "data"):
            known.pop(name)
        memory = self.cache / "checksums.json"
        return {
            **known,
            "base": self.base.digest("transformer", memory),
            "data": corpus.digest(self.items),
        }

    def _saved(self, file: Path) -> dict[str, Any] | None:
        if not file.exists():
            return None
        with states.reading(file, RESUME) as state:
            require_same(file, state["identity"], self.identity)
            return state
        return None

    def _load(self, file: Path, state: Mapping[str, Any]) -> None:
        with states.reading(file, RESUME), torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(like(state["weights"][name], parameter))
                if self.average:
                    self.average[name].copy_(like(state["average"][name], parameter))
            load_optimizer(self.optimizer, state["optimizer"], list(self.named.values()))
            self.draws.counters = [list(map(int, counts)) for counts in state["counters"]]
            self.step = int(state["step"])
        log.info("resumed %s at step %d", file, self.step)

    def _sharded(self) -> bool:
        """Whether the model is cut into shards, as --shard or accelerate's configuration says."""
        wanted = self.settings.shard or os.environ.get("ACCELERATE_USE_FSDP", "") == "true"
        if wanted and self.settings.base_dtype in ("fp8", "4bit"):
            raise SettingsError(
                f"a base in {self.settings.base_dtype} cannot be sharded; use --base-dtype "
                "bf16, or copies (no --shard)"
            )
        if wanted and not dist.is_initialized():
            raise SettingsError("--shard needs processes: accelerate launch -m training.lora ...")
        return wanted

    def _write_seen(self) -> None:
        """Which pictures a generator saw, for whoever checks a test set against it."""
        lines = [
            json.dumps({
                "file": str(item.file), "group": item.record.group, "sha256": item.sha256,
                "source": item.record.source, "licence": item.record.licence,
            })
            for item in self.items
        ]  # fmt: skip
        files.write(self.settings.out / "seen.jsonl", ("\n".join(lines) + "\n").encode())

    # The steps

    def _steps(self, file: Path, journal: Journal, previews: Previews | None) -> bool:
        """All that are left; whether a signal ended them early."""
        settings, saved_at, saved_step = self.settings, time.monotonic(), self.step
        while self.step < settings.steps:
            journal.begin()
            rate = optimizers.rate(self.step, settings)
            optimizers.set_rate(self.optimizer, rate)
            batch = self.draws.batch(self.step)
            loss, norm = self._step(batch)
            due = time.monotonic() - saved_at > settings.save_minutes * 60
            loss, stop, save = self._agree(loss, bool(self.got), due)
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise Diverged(
                    f"step {self.step + 1}: the loss is {loss} and its gradient's norm {norm}; "
                    f"{file} has step {saved_step}, before it. Lower --rate (now {rate:.3g}), "
                    "or leave --base-dtype fp16"
                )
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self._follow()
            journal.tell(self.step, loss=loss, rate=rate, norm=norm)
            last = self.step == settings.steps
            if stop or save or last:
                self._save(file)
                saved_at, saved_step = time.monotonic(), self.step
            if stop and not last:
                log.info("stopped at step %d; the same command goes on", self.step)
                return True
            if previews is not None and (last or self.step % settings.preview_steps == 0):
                self._preview(previews, journal)
        return False

    def _step(self, batch: Batch) -> tuple[float, float]:
        """Gradients of the whole batch; this process's mean loss and the gradient's norm."""
        settings, model = self.settings, self.base.checkpoint.model
        micro = settings.micro or self.share
        grid = (batch.bucket[0] // model.scale, batch.bucket[1] // model.scale)
        tokens = grid[0] * grid[1] // 4
        drawn = torch.from_numpy(batch.uniform)
        shares = objective.shares(drawn, settings.timesteps, self.schedule, tokens)
        scale = _LOSS_SCALE if self.trainee.dtype == torch.float16 else 1.0
        begin = self.place * self.share
        total = torch.zeros((), device=self.device)
        for start in range(begin, begin + self.share, micro):
            places = range(start, start + micro)
            final = start + micro == begin + self.share
            waiting = nullcontext() if final else self.spread.alone()
            with waiting:
                clean = torch.stack([self._latents(batch, place) for place in places])
                shape = (tokens, 4 * model.latent_channels)
                drawn_noise = [noise(settings.seed, self.step, p, shape) for p in places]
                mess = torch.stack([torch.from_numpy(one) for one in drawn_noise])
                clean, mess = clean.to(self.device), mess.to(self.device)
                share = shares[start : start + micro].to(self.device)
                velocity = self.spread.model(
                    objective.mixed(clean, mess, share), share, grid=grid,
                    **self._text(batch, places),
                )  # fmt: skip
                each = objective.losses(velocity, clean, mess)
                (each.mean() * (micro / self.share * scale)).backward()
                total += each.detach().sum() / self.share
        return float(total), self._clip(scale)

    def _latents(self, batch: Batch, place: int) -> Tensor:
        assert self.latents is not None
        item = self.items[batch.items[place]]
        turns = self.latents.get(encode.latent_key(item, self.settings.turns))
        return objective.pack(turns[batch.turns[place]].float()[None])[0]

    def _text(self, batch: Batch, places: range) -> dict[str, Any]:
        texts = ["" if batch.dropped[p] else self.items[batch.items[p]].text for p in places]
        if self.texts is None:
            return {"texts": texts}
        keys = [encode.text_key(text) for text in texts]
        return {
            part: torch.stack([self.texts.get(f"{key}.{part}") for key in keys]).to(self.device)
            for part in encode.PARTS
        }

    def _clip(self, scale: float) -> float:
        values = list(self.named.values())
        if scale != 1.0:
            torch._foreach_div_([v.grad for v in values if v.grad is not None], scale)
        norm = nn.utils.clip_grad_norm_(values, self.settings.clip)
        return float(whole(norm))

    def _agree(self, loss: float, stop: bool, save: bool) -> tuple[float, bool, bool]:
        """The mean loss, whether anybody was told to stop, and whether the first is due to save."""
        if self.world == 1:
            return loss, stop, save
        first = self.place == 0
        told = torch.tensor([loss / self.world, stop, save and first], device=self.device,
                            dtype=torch.float64)  # fmt: skip
        dist.all_reduce(told)
        return float(told[0]), bool(told[1]), bool(told[2])

    @torch.no_grad()
    def _follow(self) -> None:
        """The average follows; sooner at the start (as in `training.generator`)."""
        if self.average:
            decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
            now = [parameter.detach() for parameter in self.named.values()]
            torch._foreach_lerp_(list(self.average.values()), now, 1 - decay)

    # What is written

    def _save(self, file: Path) -> None:
        state = {
            "identity": self.identity,
            "step": self.step,
            "weights": whole(dict(self.named)),
            "average": whole(self.average),
            "optimizer": whole(self.optimizer.state_dict()),
            "counters": self.draws.counters,
        }
        failed = False
        if self.place == 0:
            try:
                write_state(file, state)
            except StateError:
                if self.world == 1:
                    raise
                log.exception("not saved")
                failed = True
        if self.world > 1:
            told = torch.tensor(float(failed), device=self.device)
            dist.all_reduce(told)
            if told:
                raise StateError(f"{file} could not be saved by the first process")

    def _preview(self, previews: Previews, journal: Journal) -> None:
        """Drawn with the average, where there is one, as the adapter will be."""
        kept = {name: value.detach().clone() for name, value in self.named.items()}
        with torch.no_grad():
            for name, value in self.average.items():
                self.named[name].copy_(value)
            images = []
            for place, (prompt, image) in enumerate(previews.draw(self.trainee)):
                images.append(image)
                journal.show(self.step, f"{place}: {prompt[:60]}", image)
            for name, before in kept.items():
                self.named[name].copy_(before)
        if self.place == 0:
            folder = self.settings.out / "previews"
            folder.mkdir(exist_ok=True)
            Image.fromarray(sheet(images)).save(folder / f"{self.step:07}.png")

    def _end(self, journal: Journal, stopped: bool) -> dict[str, Any]:
        settings = self.settings
        values = whole(self.average or dict(self.named))
        file = settings.out / ADAPTER
        report = {
            "out": str(settings.out),
            "adapter": None if stopped else str(file),
            "steps": self.step,
            "loss": journal.last.get("loss"),
            "samples_per_s": round(journal.samples_per_s, 4),
            "peak_bytes": peak_bytes(self.device),
            "pictures": len(self.items),
            "left_out": self.broken,
            "stopped": stopped,
        }
        if self.place == 0 and not stopped:
            about = self._about(journal.last.get("loss"))
            try:
                adapter.write(file, adapter.Adapter(factors(self.trainee.layers, values), about))
            except OSError as error:
                raise StateError(
                    f"{file} could not be written ({error.strerror}); {settings.out / STATE} has "
                    "all of it. Free some room and run the same command again"
                ) from error
        return report

    def _about(self, loss: float | None) -> dict[str, str]:
        """The adapter's description: safetensors metadata holds texts alone."""
        settings = self.settings
        texts = {
            "name": settings.out.resolve().name,
            "base": self.base.name,
            "base_sha256": self.identity["base"],
            "base_licence": self.base.licence,
            "rank": settings.rank,
            "alpha": settings.alpha,
            "targets": ",".join(settings.targets),
            "data_sha256": self.identity["data"],
            "pictures": len(self.items),
            "steps": self.step,
            "loss": loss,
            "wording": WORDING,
            "trigger": settings.trigger,
        }
        about = {name: str(value) for name, value in texts.items()}
        pairs = corpus.licences(self.items)
        about["data"] = json.dumps([{"source": s, "licence": one} for s, one in pairs])
        about["strata"] = json.dumps({"/".join(k): n for k, n in self.draws.strata.items()})
        about["settings"] = json.dumps(settings.document())
        return about


def _share(settings: Settings, world: int) -> int:
    """Pictures of a step that one process sees."""
    share, rest = divmod(settings.batch, world)
    if rest or (settings.micro and share % settings.micro):
        raise SettingsError(
            f"--batch {settings.batch} is not a multiple of {world} processes"
            + (f" times --micro {settings.micro}" if settings.micro else "")
        )
    return share
