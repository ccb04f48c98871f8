"""What a run saves and takes up again: weights, their average, optimizer, counters, step.

    >>> write(file, {"step": 120, ...})
    >>> with states.reading(file, RESUME) as state: ...

A state is written beside the old one, flushed to the disk and put in its place, so that whatever
stops the run, the last good one is there. All of it is tensors and plain values, which torch loads
with `weights_only`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dermaflux import files
from dermaflux.errors import DermaFluxError

log = logging.getLogger(__name__)

STATE: Final = "state.pt"
RESUME: Final = "delete it to begin again, or give another --out"


class StateError(DermaFluxError):
    """A state cannot be written, or is of another run."""


def whole(value: Any) -> Any:
    """A copy on the CPU of a tensor, put together where it is sharded (every process takes part);
    anything else as it is. Looks into dictionaries and lists."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: whole(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [whole(one) for one in value]
    return value


def like(value: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, sharded and placed as `model` is where they have the same shape."""
    if isinstance(model, DTensor) and value.shape == model.shape:
        placed = value.to(model.device)
        return distribute_tensor(placed, model.device_mesh, model.placements)
    return value


def load_optimizer(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], parameters: Sequence[nn.Parameter]
) -> None:
    """Give an optimizer what `whole(optimizer.state_dict())` was.

    Raises:
        ValueError: it is another optimizer's.
    """
    moments = {
        index: {
            name: like(one, parameters[index]) if isinstance(one, Tensor) else one
            for name, one in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def write(file: Path, state: Mapping[str, Any]) -> None:
    """Save a state, whole or not at all.

    Raises:
        StateError: the disk is full or takes no files; the last state is still there.
    """
    part = file.with_suffix(".part")
    try:
        with part.open("wb") as stream:
            # torch's own writer turns a full disk into an error of its own; keep the disk's.
            torch.save(dict(state), stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise _unsaved(f"step {state.get('step')}", file, file, error) from error


@contextmanager
def saving(what: str, file: Path, folder: Path) -> Iterator[None]:
    """What the disk refuses within the block is said as `write` says it; `folder` is the run's.

    Raises:
        StateError: `what` could not be written to `file`.
    """
    try:
        yield
    except OSError as error:
        raise _unsaved(what, file, folder / STATE, error) from error


def _unsaved(what: str, file: Path, state: Path, error: Exception) -> StateError:
    why = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        why = error.strerror
    free = shutil.disk_usage(file.parent).free
    kept = f"the last good state, {state}, is kept" if state.exists() else "there is no state yet"
    return StateError(
        f"{what} could not be saved to {file} ({why}; {free / 1e6:.0f} MB free): {kept}. "
        "Free some room and run the same command again"
    )


def require_same(file: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a state is of this very run: its settings, base and data.

    Raises:
        StateError: it is not; with what differs.
    """
    differing = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if differing:
        raise StateError(f"{file} is another run's: {'; '.join(differing)}. {RESUME}")


def cut_log(file: Path, step: int) -> None:
    """Drop the log's lines from `step` on, which a run that goes on there writes anew, and a last
    line that was not finished."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_bytes().split(b"\n"):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            continue
    files.write(file, b"".join(kept))
