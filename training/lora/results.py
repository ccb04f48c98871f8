"""What a run leaves: the adapter with its description, and which pictures it saw.

>>> write_adapter(settings, base, data, layers, values, step=2000, loss=0.61)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from torch import Tensor

from dermaflux import files
from dermaflux.prompt import WORDING
from training import adapter
from training.lora import corpus
from training.lora.base import Base
from training.lora.layers import LoraLinear, factors
from training.lora.prepare import Prepared
from training.lora.settings import Settings
from training.lora.state import StateError

ADAPTER: Final = "adapter.safetensors"
SEEN: Final = "seen.jsonl"


def write_seen(folder: Path, data: Prepared) -> None:
    """A line a picture that is trained on, for whoever checks a test set against it."""
    lines = [
        json.dumps(
            {
                "file": str(item.file),
                "group": item.record.group,
                "sha256": item.sha256,
                "source": item.record.source,
                "licence": item.record.licence,
                "attribution": item.record.attribution,
            }
        )
        for item in data.items
    ]
    files.write(folder / SEEN, ("\n".join(lines) + "\n").encode())


def write_adapter(
    settings: Settings, base: Base, data: Prepared, layers: Mapping[str, LoraLinear],
    values: Mapping[str, Tensor], *, step: int, loss: float | None,
) -> Path:  # fmt: skip
    """Write `adapter.safetensors` in diffusers' layout.

    Raises:
        StateError: the disk is full or takes no files; the run's state has everything.
    """
    file = settings.out / ADAPTER
    about = _about(settings, base, data, step, loss)
    try:
        adapter.write(file, adapter.Adapter(factors(layers, values), about))
    except OSError as error:
        raise StateError(
            f"{file} could not be written ({error.strerror}); the state beside it has all of it. "
            "Free some room and run the same command again"
        ) from error
    return file


def is_written(file: Path, step: int) -> bool:
    """Whether an adapter is there that can be read, and is that of a step."""
    try:
        return adapter.opened(file).about.get("steps") == str(step)
    except adapter.AdapterError:
        return False


def _about(
    settings: Settings, base: Base, data: Prepared, step: int, loss: float | None
) -> dict[str, str]:
    """The adapter's description: safetensors metadata holds texts alone."""
    strata = Counter("/".join(item.stratum) for item in data.items)
    content = {
        "name": settings.out.resolve().name,
        "base": base.name,
        "base_sha256": data.identity["base"],
        "base_licence": base.licence,
        "rank": settings.rank,
        "alpha": settings.alpha,
        "targets": ",".join(settings.targets),
        "data": json.dumps(corpus.licences(data.items)),
        "captions": json.dumps(corpus.captioners(data.items)),
        "data_sha256": data.identity["data"],
        "pictures": len(data.items),
        "strata": json.dumps(strata),
        "steps": step,
        "loss": loss,
        "wording": WORDING,
        "trigger": settings.trigger,
        "settings": json.dumps(settings.document(places=False)),
    }
    return {name: str(value) for name, value in content.items()}
