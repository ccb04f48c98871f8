"""Before the steps: what is trained on, encoded and cached, and what makes the run what it is.

>>> data = prepare(settings, base, place)
>>> data.latents.get(encode.latent_key(data.items[0], settings.turns)).shape
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from dermaflux import files
from dermaflux.errors import DatasetError
from training.lora import corpus, encode, held_out
from training.lora.base import DTYPES, Base
from training.lora.corpus import Item
from training.lora.settings import LATER, Settings, SettingsError
from training.lora.store import Store

log = logging.getLogger(__name__)

_PAPER: Final = 512
"""The side, in pixels, at which the paper's sampler draws."""


@dataclass(frozen=True)
class Place:
    """Which process this is, of how many, on which device; `stop` tells whether to stop, and
    `wait` returns when all processes have come to it."""

    index: int
    world: int
    device: torch.device
    stop: Callable[[], bool]
    wait: Callable[[], None]

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.index == 0


@dataclass(frozen=True)
class Prepared:
    """Items with their caches (`texts` is None where they are encoded at every step), the side of
    previews, how many pictures were left out, and the run's identity."""

    items: list[Item]
    latents: Store
    texts: Store | None
    side: int
    left_out: int
    identity: dict[str, Any]


def prepare(settings: Settings, base: Base, place: Place) -> Prepared:
    """Read the datasets and fill the caches; each process encodes its part.

    Raises:
        SettingsError: a size is smaller than the model's token.
        DatasetError: nothing is left to train on.
        DermaFluxError: the disk has no room, or the base's weights are not there.
        Cancelled: a signal came; what was encoded is kept.
    """
    model, defaults = base.checkpoint.model, base.checkpoint.defaults
    sizes = settings.sizes or (min(_PAPER, defaults.height, defaults.width),)
    token = 2 * model.scale
    if min(sizes) < token:
        raise SettingsError(
            f"--sizes {min(sizes)} is smaller than a token of the model, {token} px; use {token} "
            "or more"
        )
    known = corpus.buckets(sizes, settings.aspect, token)
    found, broken = corpus.read(settings, known)
    if place.first:
        held_out.check(settings, found)
    cache = settings.cache or settings.out / "cache"
    given: Any = {
        "device": place.device,
        "dtype": _dtype(settings, place.device),
        "stop": place.stop,
        "share": (place.index, place.world),
    }
    latents, unread = encode.latents(found, base, cache, turns=settings.turns, **given)
    broken |= unread
    texts = None
    if not settings.text_encoders and not settings.keep_encoders:
        wanted = [*(item.text for item in found), "", *settings.prompts]
        texts = encode.texts(wanted, base, cache, **given)
    place.wait()
    if place.world > 1:
        latents = Store(latents.folder)
        texts = Store(texts.folder) if texts is not None else None
    items = [item for item in found if encode.latent_key(item, settings.turns) in latents]
    if not items:
        raise DatasetError(f"no picture is left to train on; {corpus.first(broken)}")
    if broken:
        log.warning("%d pictures are left out; first: %s", len(broken), corpus.first(broken))
        if place.first:
            content = json.dumps(broken, indent=1, sort_keys=True)
            files.write(settings.out / "broken.json", content.encode())
    cut, looked = encode.too_long(items, base)
    if cut:
        log.warning("%d of %d texts are cut at %d tokens", cut, looked, model.text_length)
    memory = cache / "checksums.json"
    identity = {
        **{k: v for k, v in settings.document().items() if k not in (*LATER, *_NAMED)},
        "base": base.digest("transformer", memory),
        "encoders": [base.digest(part, memory) for part in _ENCODERS],
        "data": corpus.digest(items),
    }
    return Prepared(items, latents, texts, min(sizes), len(broken), identity)


_ENCODERS: Final = ("vae", "text_encoder", "text_encoder_2")
_NAMED: Final = ("base", "encoders", "data")
"""Stand in the identity by what is in them, and may move."""


def _dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """What the encoders compute in, and texts are kept in."""
    if settings.base_dtype in DTYPES:
        return DTYPES[settings.base_dtype]
    return torch.float32 if device.type == "cpu" else torch.bfloat16
