"""What a run tells while it runs: a progress bar, `log.jsonl`, and TensorBoard where it is there.

A line of `log.jsonl` is a step: `step` (from 1), `loss` (mean over its pictures), `rate`, `norm` of
the gradient, `samples_per_s` since the run went on, `peak_bytes`.

    >>> with Journal(folder, step=0, steps=500, batch=4) as journal:
    ...     journal.tell(1, loss=0.9, rate=1e-4, norm=1.0)
"""

from __future__ import annotations

import importlib.util
import json
import logging
import resource
import threading
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import torch
from tqdm import tqdm

from training.lora.state import StateError, cut_log, saving

log = logging.getLogger(__name__)

_WARM: Final = 5
"""Steps whose time is not counted: first calls allocate, compile and tune."""
_EVERY: Final = 10


def peak_bytes(device: torch.device) -> int:
    """The most memory that was in use: the GPU's by torch, or this process's resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Journal:
    """Writes for one process; `quiet` ones only keep the time.

    Raises:
        StateError: the disk is full or takes no files; so do `tell`, `show` and the block's end.
    """

    def __init__(
        self, folder: Path, *, step: int, steps: int, batch: int, device: torch.device,
        quiet: bool = False,
    ) -> None:  # fmt: skip
        self._folder, self._step = folder, step
        self._quiet = quiet
        self._batch, self._device, self._steps = batch, device, steps
        self._done = 0
        self._spent = 0.0
        self._began: float | None = None
        self.last: dict[str, Any] = {}
        self._board: Any = None
        self._lines: Any = None
        self._bar = tqdm(total=steps, initial=step, desc="lora", unit="step", disable=quiet)

    def begin(self) -> None:
        """A step begins: the time until `tell` is its own, and what lies between steps is not."""
        self._began = time.perf_counter()

    def tell(self, step: int, *, loss: float, rate: float, norm: float) -> None:
        """A step was done."""
        assert self._began is not None
        self._done += 1
        if self._done > min(_WARM, self._steps // 2):
            self._spent += time.perf_counter() - self._began
        self.last = {
            "step": step,
            "loss": round(loss, 8),
            "rate": rate,
            "norm": round(norm, 6),
            "samples_per_s": round(self.samples_per_s, 4),
            "peak_bytes": peak_bytes(self._device),
        }
        self._bar.update(1)
        self._step = step
        if self._lines is None:
            return
        with self._written(self._folder / "log.jsonl"):
            self._lines.write(json.dumps(self.last) + "\n")
            self._lines.flush()
        if self._done % _EVERY == 0:
            self._bar.set_postfix(loss=f"{loss:.4f}", samples_per_s=f"{self.samples_per_s:.2f}")
        if self._board is not None:
            with self._written(self._folder / "tensorboard"):
                for name in ("loss", "rate", "norm", "samples_per_s", "peak_bytes"):
                    self._board.add_scalar(name, self.last[name], step)

    @property
    def samples_per_s(self) -> float:
        """Pictures a second over all processes, warm-up, saving and previews left out."""
        counted = self._done - min(_WARM, self._steps // 2)
        return counted * self._batch / self._spent if counted > 0 and self._spent else 0.0

    def show(self, step: int, name: str, image: np.ndarray[Any, Any]) -> None:
        """A preview, uint8 [H, W, 3], for TensorBoard."""
        if self._board is not None:
            with self._written(self._folder / "tensorboard"):
                self._board.add_image(name, image, step, dataformats="HWC")

    def _written(self, file: Path) -> AbstractContextManager[None]:
        return saving(f"step {self._step}", file, self._folder)

    def __enter__(self) -> Journal:
        self._hook = threading.excepthook
        threading.excepthook = self._in_thread
        try:
            if not self._quiet:
                self._open()
        except BaseException:
            threading.excepthook = self._hook
            raise
        return self

    def _open(self) -> None:
        with self._written(self._folder / "log.jsonl"):
            cut_log(self._folder / "log.jsonl", self._step)
            self._lines = (self._folder / "log.jsonl").open("a", encoding="utf-8")
        if importlib.util.find_spec("tensorboard") is None:
            log.info("no TensorBoard: pip install tensorboard; log.jsonl has the numbers")
            return
        from torch.utils.tensorboard import SummaryWriter

        board = str(self._folder / "tensorboard")
        with self._written(Path(board)):
            self._board = SummaryWriter(board, purge_step=self._step + 1)  # type: ignore[no-untyped-call, unused-ignore]

    def _in_thread(self, told: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread of its own, and tells of a full disk at the next call too:
        there it is a sentence, so it need not be a traceback here."""
        of_board = type(told.thread).__module__.startswith("tensorboard.")
        if not (of_board and isinstance(told.exc_value, OSError)):
            self._hook(told)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._bar.close()
        try:
            for name, one in (("tensorboard", self._board), ("log.jsonl", self._lines)):
                # What ended the block comes first.
                ignored = suppress(StateError) if error is not None else nullcontext()
                with ignored, self._written(self._folder / name):
                    if one is not None:
                        one.close()
        finally:
            threading.excepthook = self._hook
