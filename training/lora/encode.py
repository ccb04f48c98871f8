"""Pictures -> latents and texts -> embeddings, once, on disk; the encoders are freed afterwards.

Keys say what a tensor was made of: the folder has the encoders' checksum, the name that of the
picture and its bucket, or of the text. A run that is interrupted, or another run on the same data,
encodes only what is missing.

    >>> store = latents(items, base, cache, turns=4, device=device, dtype=dtype, stop=stop)
    >>> store.get(latent_key(items[0], 4)).shape     # [turns, C, h, w], as the transformer has them
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from tqdm import tqdm

from dermaflux.errors import Cancelled, DatasetError, DermaFluxError
from training.lora.base import Base, Writer
from training.lora.corpus import Bucket, Item, pixels, turned
from training.lora.store import Store

log = logging.getLogger(__name__)

Stop = Callable[[], bool]
PARTS: Final = ("hidden", "pooled")
Share = tuple[int, int]
"""(this process, of how many): each encodes every n-th."""
_PIXELS: Final = {"cuda": 2**21, "cpu": 2**18}
"""Pixels that the VAE is given at once (two pictures of 1024 px, one of 512): some 3 kB each."""
_TEXTS: Final = 8
_HALF_RANGE: Final = 127.5


def latent_key(item: Item, turns: int) -> str:
    """The name of a picture's latents."""
    return f"{item.sha256}-{item.bucket[0]}x{item.bucket[1]}-{turns}"


def text_key(text: str) -> str:
    """The name of a text's embeddings, before `.hidden` and `.pooled`."""
    return hashlib.sha256(text.encode()).hexdigest()


def latents(
    items: Sequence[Item], base: Base, cache: Path, *, turns: int, device: torch.device,
    dtype: torch.dtype, stop: Stop, share: Share = (0, 1),
) -> tuple[Store, dict[str, str]]:  # fmt: skip
    """The store with all items' latents, float16 [turns, C, h, w], shifted and scaled; and the
    files that could not be read, with why.

    The mean of the VAE's distribution is taken: its deviation is a hundredth of the latents' own.

    Raises:
        DermaFluxError: the disk has no room.
        Cancelled: `stop` said so; what was encoded is kept.
    """
    folder = cache / f"latents-{base.digest('vae', cache / 'checksums.json')[:16]}"
    model = base.checkpoint.model
    broken: dict[str, str] = {}
    with Store(folder, writing=True) as store:
        # Shared out before what is there is left out: another process may write meanwhile.
        own = list({latent_key(item, turns): item for item in items}.items())[share[0] :: share[1]]
        todo = [item for name, item in own if name not in store]
        cell = model.latent_channels * torch.float16.itemsize * turns
        _require_room(
            folder, sum(h * w // model.scale**2 * cell for h, w in (i.bucket for i in todo))
        )
        if not todo:
            return store, broken
        vae = base.part("vae_encoder", dtype).to(device)
        bar = tqdm(total=len(todo), desc="latents", unit="picture", disable=share[0] > 0)
        for bucket, group in _by_bucket(todo, turns, _PIXELS.get(device.type, 2**20)):
            if stop():
                raise Cancelled("stopped while encoding pictures; the same command goes on")
            images, kept = _load(group, turns, broken)
            if kept:
                batch = torch.cat(images).permute(0, 3, 1, 2).to(device, torch.float32)
                with torch.inference_mode():
                    sample = (batch / _HALF_RANGE - 1).to(dtype)
                    mean = vae(sample)[0].chunk(2, dim=1)[0].float()
                scaled = (mean - model.shift_factor) * model.scaling_factor
                parts = scaled.half().cpu().split(turns)
                for item, part in zip(kept, parts, strict=True):
                    if not torch.isfinite(part).all():
                        broken[str(item.file)] = f"the VAE's latents of {bucket} are not finite"
                        continue
                    store.add(latent_key(item, turns), part)
            bar.update(len(group))
        bar.close()
    return store, broken


def _by_bucket(items: Iterable[Item], turns: int, most: int) -> Iterator[tuple[Bucket, list[Item]]]:
    """Groups of one bucket that the VAE takes at once."""
    waiting: dict[Bucket, list[Item]] = {}
    for item in items:
        h, w = item.bucket
        group = waiting.setdefault(item.bucket, [])
        group.append(item)
        if (len(group) + 1) * turns * h * w > most:
            yield item.bucket, waiting.pop(item.bucket)
    yield from waiting.items()


def _load(
    group: Sequence[Item], turns: int, broken: dict[str, str]
) -> tuple[list[Tensor], list[Item]]:
    """Read pictures beside each other; one that fails is told of and left out."""

    def one(item: Item) -> Tensor | DatasetError:
        try:
            return torch.from_numpy(turned(pixels(item), turns))
        except DatasetError as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(one, group))
    kept = []
    images = []
    for item, image in zip(group, loaded, strict=True):
        if isinstance(image, Tensor):
            kept.append(item)
            images.append(image)
        else:
            broken[str(item.file)] = str(image)
    return images, kept


def texts(
    wanted: Iterable[str], base: Base, cache: Path, *, device: torch.device, dtype: torch.dtype,
    stop: Stop, share: Share = (0, 1),
) -> Store:  # fmt: skip
    """The store with the embeddings of all texts in `dtype`: KEY.hidden [text length, D] and
    KEY.pooled [P].

    Raises:
        DermaFluxError: the disk has no room, as FLUX.1's 4 MB a text soon need.
        Cancelled: `stop` said so; what was encoded is kept.
    """
    memory = cache / "checksums.json"
    encoders = "".join(base.digest(part, memory)[:8] for part in ("text_encoder", "text_encoder_2"))
    model = base.checkpoint.model
    kind = str(dtype).removeprefix("torch.")
    folder = cache / f"texts-{encoders}-{model.clip_length}-{model.text_length}-{kind}"
    with Store(folder, writing=True) as store:
        own = list(dict.fromkeys(wanted))[share[0] :: share[1]]
        # A shard may have ended between the two halves: then both are made again.
        todo = [t for t in own if any(f"{text_key(t)}.{part}" not in store for part in PARTS)]
        if not todo:
            return store
        writer = Writer(base, dtype).to(device)
        t5: Any = writer.text_encoder_2
        width = int(t5.model.config.d_model)
        try:
            _require_room(folder, len(todo) * model.text_length * width * dtype.itemsize)
        except DermaFluxError as error:
            raise DermaFluxError(f"{error}; or encode at every step with --keep-encoders") from None
        bar = tqdm(total=len(todo), desc="texts", unit="text", disable=share[0] > 0)
        for start in range(0, len(todo), _TEXTS):
            if stop():
                raise Cancelled("stopped while encoding texts; the same command goes on")
            group = todo[start : start + _TEXTS]
            with torch.inference_mode():
                hidden, pooled = writer(group)
            for text, one, other in zip(group, hidden, pooled, strict=True):
                store.add(f"{text_key(text)}.hidden", one.to(dtype))
                store.add(f"{text_key(text)}.pooled", other.to(dtype))
            bar.update(len(group))
        bar.close()
    return store


def too_long(items: Sequence[Item], base: Base, most: int = 2000) -> tuple[int, int]:
    """Of the first `most` distinct texts: how many T5 cuts, and how many were looked at.

    CLIP cuts most captions at 77 tokens; Flux takes from it the pooled output alone.
    """
    from dermaflux.engines import eager

    tokens = eager.tokenizers(base.checkpoint)["tokenizer_2"]
    distinct = list(dict.fromkeys(item.text for item in items))[:most]
    return sum(tokens.count(text) > tokens.length for text in distinct), len(distinct)


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DermaFluxError(
            f"the cache in {folder} needs {_size(needed)} more, and {_size(free)} are free; "
            "free some, or give --cache on another disk"
        )


def _size(count: int) -> str:
    """Bytes for people: 1.2 GB, 3.4 MB, 5.6 kB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
