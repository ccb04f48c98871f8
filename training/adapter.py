"""LoRA adapters on disk, in the key layouts of diffusers and of kohya's sd-scripts.

    >>> adapter = read(Path("flux_lora_64_64.safetensors"))
    >>> adapter.layers["transformer.transformer_blocks.0.attn.to_q"].rank
    64
    >>> write(Path("pytorch_lora_weights.safetensors"), adapter)

Layers are named as diffusers and transformers 5 name their modules, behind the part's folder:
`transformer`, `text_encoder` (CLIP, without the `text_model.` that files carry) and
`text_encoder_2` (T5). `FluxPipeline.load_lora_weights` opens both layouts, all but T5's layers and
kohya's names of those outside the blocks. Alpha is a tensor in kohya's layout, and stands in peft's
settings, where diffusers looks for it, in the other.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from training import adapter_keys, kohya, tensors
from training.adapter_keys import PARTS, Source
from training.factors import AdapterError, Factors
from training.tensors import Entry, TensorFile

__all__ = [
    "PARTS", "Adapter", "AdapterError", "Factors", "Lazy", "Opened", "opened", "read", "write",
]  # fmt: skip

LAYOUTS: Final = ("diffusers", "kohya")

_PEFT: Final = "lora_adapter_metadata"
"""Where diffusers keeps peft's settings (diffusers/loaders/lora_base.py), as JSON."""
_RANKS: Final = "dermaflux.ranks"
"""Ranks of the parts of each block-diagonal module, as JSON; only kohya's layout has such."""
_OWN: Final = (_PEFT, _RANKS, "format")


@dataclass(frozen=True)
class Adapter:
    """An adapter: its layers by name, and its description, as in the file's metadata."""

    layers: Mapping[str, Factors]
    about: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Opened(Adapter):
    """An adapter whose layers stay in their file."""

    layers: Lazy


def read(path: Path) -> Adapter:
    """Read an adapter into memory: float32 factors, whatever the file's type.

    Raises:
        AdapterError: the file is missing, cut or a pickle, a layer lacks a factor, ranks differ,
            a number is not finite, or there is a key that is no LoRA's; with what to do.
    """
    lazy = opened(path)
    return Adapter(dict(lazy.layers.items()), lazy.about)


def opened(path: Path) -> Opened:
    """As `read`, but each layer is read from the file whenever it is asked for.

    Names, shapes and alphas are checked now, numbers when they are read. The file must stay.
    """
    try:
        file = TensorFile.open(path)
    except tensors.WeightsError as error:
        raise AdapterError(f"{error}") from error
    sources = adapter_keys.sources(file)
    names = [name for name in sources if name.startswith(kohya.PREFIXES)]
    if names and len(names) < len(sources):
        other = next(name for name in sources if name not in names)
        raise AdapterError(f"{path} mixes layouts: it has {names[0]} and {other}; keep one")
    about = {key: text for key, text in file.metadata.items() if key not in _OWN}
    try:
        layers = _kohya(file, sources) if names else _diffusers(file, sources)
    except (ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise AdapterError(f"{path}: its metadata cannot be used: {error}") from error
    return Opened(layers, about)


def write(path: Path, adapter: Adapter, layout: str = "diffusers") -> None:
    """Write an adapter, whole or not at all; factors keep their type. Equal ones make equal files.

    In kohya's layout, layers that share a module are written block-diagonally, unless they have one
    `down`, as those read from a file of kohya's have.

    Raises:
        AdapterError: the layout is not known, or has no name for a layer.
        OSError: the disk is full, or takes no files there.
    """
    if layout not in LAYOUTS:
        raise AdapterError(f"layout {layout!r} is not known; use {' or '.join(LAYOUTS)}")
    content: dict[str, Tensor] = {}
    about = {key: text for key, text in adapter.about.items() if key not in _OWN}
    if layout == "kohya":
        ranks: dict[str, tuple[int, ...]] = {}
        for name, parts in _modules(path, adapter.layers).items():
            one, found = kohya.fused(name, parts)
            content[f"{name}.lora_down.weight"] = one.down
            content[f"{name}.lora_up.weight"] = one.up
            content[f"{name}.alpha"] = torch.tensor(float(one.alpha))
            if found:
                ranks[name] = found
        if ranks:
            about[_RANKS] = json.dumps(ranks, sort_keys=True, separators=(",", ":"))
    else:
        for name, one in adapter.layers.items():
            content[f"{_in_file(path, name)}.lora_A.weight"] = one.down
            content[f"{_in_file(path, name)}.lora_B.weight"] = one.up
        about[_PEFT] = json.dumps(_peft(adapter.layers), sort_keys=True, indent=2)
    entries = {name: Entry.of(tensor) for name, tensor in content.items()}
    tensors.write(path, entries, content.__getitem__, {"format": "pt", **about})


class Lazy(Mapping[str, Factors]):
    """The layers of a file, each read when asked for: a part of a source, with an alpha."""

    def __init__(
        self, file: TensorFile, places: Mapping[str, tuple[Source, float, int, Sequence[int]]]
    ) -> None:
        self._file = file
        self._places = places

    def __getitem__(self, layer: str) -> Factors:
        source, alpha, place, ranks = self._places[layer]
        down, up = self._number(source.down), self._number(source.up)
        if not source.name.startswith(kohya.PREFIXES):
            return Factors(down, up, alpha)
        found = kohya.split(source.name, down, up, alpha, ranks)[place]
        assert found is not None, layer
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, layer: str) -> tuple[int, int]:
        """The shape of a layer's delta, [out, in], from the file's header alone."""
        source, _, place, _ = self._places[layer]
        width = self._file.entries[source.down].shape[1]
        if not source.name.startswith(kohya.PREFIXES):
            return source.rows, width
        return kohya.sizes(source.name, source.rows)[place], width

    def _number(self, key: str) -> Tensor:
        tensor = self._file.read(key).float()
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(
                f"{self._file.path}: {key} has numbers that are not finite; its training "
                "diverged: use an earlier state"
            )
        return tensor


def _kohya(file: TensorFile, sources: Mapping[str, Source]) -> Lazy:
    told = _told(file, _RANKS)
    places: dict[str, tuple[Source, float, int, Sequence[int]]] = {}
    for name, source in sources.items():
        layers = kohya.parts(name)
        ranks = [int(one) for one in told.get(name, ())]
        if ranks and (len(ranks) != len(layers) or sum(ranks) != source.rank or min(ranks) < 0):
            raise ValueError(f"{_RANKS} says {ranks} of {name}, whose rank is {source.rank}")
        for place, layer in enumerate(layers):
            if not ranks or ranks[place]:
                places[layer] = (source, _alpha(file, source), place, ranks)
    return Lazy(file, places)


def _diffusers(file: TensorFile, sources: Mapping[str, Source]) -> Lazy:
    told = _told(file, _PEFT)
    places: dict[str, tuple[Source, float, int, Sequence[int]]] = {}
    for name, source in sources.items():
        alpha = _alpha(file, source)
        part, _, rest = name.partition(".")
        if source.alpha is None and f"{part}.lora_alpha" in told:
            patterns = told.get(f"{part}.alpha_pattern") or {}
            alpha = float(_matching(patterns, rest, told[f"{part}.lora_alpha"]))
            if not math.isfinite(alpha):
                raise ValueError(f"{_PEFT} says an alpha of {alpha} for {name}")
            if told.get(f"{part}.use_rslora"):
                # Rank-stabilised LoRA divides by the root of the rank (arXiv 2312.03732).
                alpha *= source.rank**0.5
        places[_in_memory(name)] = (source, alpha, 0, ())
    return Lazy(file, places)


def _told(file: TensorFile, key: str) -> Mapping[str, Any]:
    """An object in the metadata; empty where there is none."""
    told = json.loads(file.metadata.get(key, "{}"))
    if not isinstance(told, dict | None):
        raise ValueError(
            f"{key} is a {type(told).__name__}, and an object of settings is needed; alpha would "
            "be lost: get the file again, or remove that key where alpha is the rank"
        )
    return told or {}


def _alpha(file: TensorFile, source: Source) -> float:
    """The file's alpha; the rank where none is told, as every loader takes it."""
    if source.alpha is None:
        return float(source.rank)
    alpha = float(file.read(source.alpha))
    if not math.isfinite(alpha):
        raise AdapterError(f"{file.path}: {source.alpha} is {alpha}; needed is a finite number")
    return alpha


def _matching(patterns: Mapping[str, float], name: str, otherwise: float) -> float:
    """As peft finds a layer's alpha: the first pattern that the name ends with."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return otherwise


def _peft(layers: Mapping[str, Factors]) -> dict[str, Any]:
    """peft's settings by part, with which diffusers makes its layers."""
    content: dict[str, Any] = {}
    for part in PARTS:
        mine = {n.partition(".")[2]: f for n, f in layers.items() if n.startswith(f"{part}.")}
        if not mine:
            continue
        rank = Counter(one.rank for one in mine.values()).most_common(1)[0][0]
        alpha = Counter(one.alpha for one in mine.values()).most_common(1)[0][0]
        # A name in a list also means every module that ends with it; `proj_out` is the last layer,
        # and one in each single-stream block. Exact, unless CLIP may have a name in front.
        exact = part != "text_encoder"
        pattern = {name: ("^" if exact else "") + re.escape(name) for name in mine}
        targets: str | list[str] = sorted(mine)
        if exact and any(a != b and a.endswith(f".{b}") for b in ("proj_out",) for a in mine):
            targets = "|".join(pattern[name] for name in sorted(mine))
        content |= {
            f"{part}.peft_type": "LORA",
            f"{part}.r": rank,
            f"{part}.lora_alpha": alpha,
            f"{part}.rank_pattern": {pattern[n]: f.rank for n, f in mine.items() if f.rank != rank},
            f"{part}.alpha_pattern": {
                pattern[n]: f.alpha for n, f in mine.items() if f.alpha != alpha
            },
            f"{part}.target_modules": targets,
        }
    return content


def _modules(path: Path, layers: Mapping[str, Factors]) -> dict[str, list[Factors | None]]:
    modules: dict[str, list[Factors | None]] = {}
    for layer, factors in layers.items():
        name, place = kohya.module(_in_memory(layer))
        if not name:
            raise AdapterError(
                f"{path}: kohya's layout has no name for {layer}; write diffusers' layout, or "
                "leave the layer out"
            )
        modules.setdefault(name, [None] * len(kohya.parts(name)))[place] = factors
    return modules


def _in_file(path: Path, layer: str) -> str:
    """CLIP's layers carry `text_model.` in files: old transformers need it, diffusers drops it."""
    if not adapter_keys.known(layer) or layer.startswith(kohya.PREFIXES):
        raise AdapterError(f"{path}: {layer} is no layer of {', '.join(PARTS)}")
    part, _, rest = layer.partition(".")
    if part == "text_encoder" and not rest.startswith("text_model."):
        return f"{part}.text_model.{rest}"
    return layer


def _in_memory(name: str) -> str:
    return re.sub(r"^text_encoder\.text_model\.", "text_encoder.", name)
