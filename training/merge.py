"""Merge LoRA adapters into a Flux checkpoint.

    python -m training.merge models/mini runs/melanoma/adapter.safetensors --out checkpoints/mel
    python -m training.merge FLUX.1-dev first.safetensors:0.7 second.safetensors:0.3 --out both

Every weight is `base + scale * sum(weight * alpha / rank * up @ down)` in float32, rounded once to
the stored type. Tensors go one by one from the base's shards into new ones, so that memory does not
grow with the model: a tensor, its sum in float32, and its factors. All else of the checkpoint is
copied; pickles, other programs' weights and the base's report are not, for they are not those of
what is made. What it was made of stands in `provenance.json`, and a combination that licences
forbid is refused (`dermaflux.licence`), unless `--accept-licence` names the licence. The terms of
the base's classifier count, since it is copied too, unless `--without-classifier` leaves it out.

The checkpoint appears whole: it is written beside its place, in a folder that the next run of the
same command clears away where this one was killed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from tqdm import tqdm

from dermaflux import files
from dermaflux import licence as licences
from dermaflux.checkpoint import Checkpoint
from dermaflux.command import ended
from dermaflux.errors import BundleError
from training import adapter, merge_files, merge_terms, tensors
from training.adapter import PARTS, AdapterError, Opened
from training.merge_terms import Source
from training.tensors import Entry, TensorFile

logger = logging.getLogger(__name__)

DTYPES: Final[Mapping[str, str | None]] = {
    "keep": None,
    "fp32": "F32",
    "bf16": "BF16",
    "fp16": "F16",
}
_FLOATS: Final = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Settings:
    """What is merged into what. `adapters` are paths with weights; see the command's help."""

    base: Path
    adapters: tuple[tuple[Path, float], ...]
    out: Path
    scale: float = 1.0
    dtype: str = "keep"
    use: str = "research"
    accepted: tuple[str, ...] = ()
    classifier: bool = True


@dataclass(frozen=True)
class _Term:
    """What one adapter adds to one tensor: `scale * up @ down`."""

    adapter: Opened
    layer: str
    weight: float


# By file of the base, and there by tensor: what is added, in the order of the command.
_Plan = Mapping[Path, Mapping[str, Sequence[_Term]]]


def merge(settings: Settings) -> dict[str, Any]:
    """Write the merged checkpoint; what was made, for the command's last line.

    Raises:
        BundleError: the base is none, or `out` cannot take the result.
        AdapterError: an adapter cannot be read, or does not fit the base: the layers by name.
        LicenceError: licences forbid the combination.
    """
    base = _base(settings.base)
    if settings.out.exists() and (not settings.out.is_dir() or any(settings.out.iterdir())):
        raise BundleError(f"{settings.out} is there already; give --out another name, or remove it")
    loaded = [(_file(path), weight) for path, weight in settings.adapters]
    opened = [(adapter.opened(path), weight) for path, weight in loaded]
    every = [
        Source(path, _sha256(path), weight, len(one.layers), one.about)
        for (path, weight), (one, _) in zip(loaded, opened, strict=True)
    ]
    name, trained_on = settings.out.resolve().name, str(base.provenance["name"])
    sources = []
    for source in merge_terms.named(every):
        if not source.weight * settings.scale:
            logger.warning(
                "%s has the weight %g and the scale %g, so nothing of it is merged: it is no "
                "ingredient", source.name, source.weight, settings.scale,
            )  # fmt: skip
            continue
        sources.append(source)
        if source.about.get("base", trained_on) != trained_on:
            logger.warning(
                "%s was trained on %s, and is merged into %s",
                source.name, source.about["base"], trained_on,
            )  # fmt: skip
    terms = merge_terms.required(
        base, sources, settings.use, settings.accepted, name=name, classifier=settings.classifier
    )
    plan = _plan(settings.base, opened, settings.scale)
    copied, left_out = merge_files.others(settings.base, settings.classifier)
    entries = {file: _entries(settings, file) for file in copied if file.suffix == ".safetensors"}
    size = {file: _size(file, entries.get(file)) for file in copied}
    merge_files.room(settings.out, sum(size.values()))
    asked = {"scale": settings.scale, "dtype": settings.dtype, "use": settings.use}
    asked |= {"accepted_licences": list(settings.accepted)}
    content = merge_terms.provenance(name, base, sources, terms, asked, settings.classifier)
    with (
        merge_files.staged(settings.out) as folder,
        tqdm(total=sum(size.values()), unit="B", unit_scale=True, desc="merging") as bar,
    ):
        for file in copied:
            target = folder / file.relative_to(settings.base)
            target.parent.mkdir(parents=True, exist_ok=True)
            changed = file in entries and (file in plan or entries[file][1])
            if changed:
                _write(file, target, entries[file][0], plan.get(file, {}), bar.update)
            else:
                merge_files.copy(file, target, bar.update)
        for index in folder.glob("*/*.safetensors.index.json"):
            merge_files.count(index)
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        files.write(folder / "provenance.json", text.encode())
        # Headers were counted with the files, and are not written by the tensor.
        bar.update(bar.total - bar.n)
    return {
        "out": str(settings.out),
        "adapters": len(sources),
        "layers": len({(f, name) for f, found in plan.items() for name in found}),
        "bytes": sum(size.values()),
        "licence": content["licence"],
        "uses": list(terms.uses),
        "duties": list(terms.duties),
        "left_out": [str(file.relative_to(settings.base)) for file in left_out],
    }


def _base(folder: Path) -> Checkpoint:
    if folder.is_file():
        raise BundleError(
            f"{folder} is a single file; a folder that FluxPipeline.save_pretrained wrote is "
            "needed. Make one with diffusers: FluxPipeline.from_pretrained(FOLDER, transformer="
            f"FluxTransformer2DModel.from_single_file({str(folder)!r}, config=FOLDER, "
            'subfolder="transformer")).save_pretrained(NEW), where FOLDER has the other parts'
        )
    base = Checkpoint.open(folder)
    for index in folder.glob("*/*.safetensors.index.json"):
        named = merge_files.shards(index)
        if missing := sorted(name for name in named if not (index.parent / name).is_file()):
            raise BundleError(f"{index.parent} lacks {', '.join(missing)}, which its index names")
    return base


def _file(path: Path) -> Path:
    """An adapter's file, where its run's folder was named."""
    for name in ("adapter.safetensors", "pytorch_lora_weights.safetensors"):
        if path.is_dir() and (path / name).is_file():
            return path / name
    return path


def _plan(base: Path, opened: Sequence[tuple[Opened, float]], scale: float) -> _Plan:
    """Where each layer goes; a layer with the weight nought goes nowhere.

    Raises:
        AdapterError: layers that the base lacks, or has in another shape.
    """
    plan: dict[Path, dict[str, list[_Term]]] = {}
    problems: list[str] = []
    weights = {part: _tensors(base / part) for part in PARTS}
    for one, weight in opened:
        for layer in one.layers:
            part, _, rest = layer.partition(".")
            # transformers 5 drops the outermost name of CLIP's tensors, files mostly have it.
            names = (f"{rest}.weight", f"text_model.{rest}.weight")
            found = [(name, file) for name in names for file in weights[part].get(name, ())]
            shape = one.layers.shape(layer)
            if not found:
                problems.append(f"{layer} is not there")
            for name, file in found:
                entry = file.entries[name]
                if entry.shape != shape:
                    problems.append(f"{layer} is {_by(entry.shape)} there, {_by(shape)} here")
                elif entry.dtype not in _FLOATS:
                    problems.append(f"{layer} is stored as {entry.dtype}, not as {_FLOATS[1:]}")
                elif weight * scale:
                    terms = plan.setdefault(file.path, {}).setdefault(name, [])
                    terms.append(_Term(one, layer, weight * scale))
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise AdapterError(
            f"the adapter does not fit {base}: {'; '.join(problems[:5])}{more}. Use the base that "
            "it was trained on"
        )
    return plan


def _tensors(folder: Path) -> dict[str, list[TensorFile]]:
    """The files of a part by tensor: one each, or more where variants (`fp16`) stand beside."""
    found: dict[str, list[TensorFile]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = _opened(path)
        for name in file.entries:
            found.setdefault(name, []).append(file)
    return found


def _opened(path: Path) -> TensorFile:
    try:
        return TensorFile.open(path)
    except tensors.WeightsError as error:
        raise BundleError(f"the base cannot be used: {error}") from error


def _entries(settings: Settings, path: Path) -> tuple[Mapping[str, Entry], bool]:
    """What a file's tensors become, and whether any has another type than before."""
    file = _opened(path)
    wanted = DTYPES[settings.dtype]
    if wanted is None or path.parent.name != "transformer":
        return file.entries, False
    new = {
        n: replace(e, dtype=wanted) if e.dtype in _FLOATS else e for n, e in file.entries.items()
    }
    return new, new != file.entries


def _write(
    source: Path,
    target: Path,
    entries: Mapping[str, Entry],
    plan: Mapping[str, Sequence[_Term]],
    written: Callable[[int], object],
) -> None:
    """One shard: each tensor with what is added to it, rounded once."""
    file = TensorFile.open(source)

    def content(name: str) -> Tensor:
        tensor = file.read(name)
        stored = tensors.DTYPES[entries[name].dtype]
        if name in plan:
            # The stored tensor is let go, so that a sum has but one beside it.
            tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
            for term in plan[name]:
                factors = term.adapter.layers[term.layer]
                up, down = factors.up.to(tensor.dtype), factors.down.to(tensor.dtype)
                tensor.addmm_(up, down, alpha=factors.scale * term.weight)
        tensor = tensor.to(stored)
        if (name in plan or stored == torch.float16) and not _finite(tensor):
            raise AdapterError(
                f"{name} does not fit {stored} after merging; use --dtype bf16 or fp32, or a "
                "smaller --scale"
            )
        written(entries[name].bytes)
        return tensor

    tensors.write(target, entries, content, file.metadata)


def _finite(tensor: Tensor) -> bool:
    """Whether all numbers are, without the temporary tensors that torch.isfinite would take."""
    return not tensor.numel() or all(math.isfinite(one) for one in torch.aminmax(tensor))


def _size(file: Path, entries: tuple[Mapping[str, Entry], bool] | None) -> int:
    if entries is None or not entries[1]:
        return file.stat().st_size
    return sum(entry.bytes for entry in entries[0].values())


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror or error}") from error


def _by(shape: Sequence[int]) -> str:
    return "x".join(str(one) for one in shape)


def weighted(text: str) -> tuple[Path, float]:
    """`"adapter.safetensors:0.5"` -> its path and weight; without a weight, 1.

    Raises:
        ValueError: the weight is not finite.
    """
    name, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        return Path(text), 1.0
    if not math.isfinite(weight):
        raise ValueError(number)
    return Path(name), weight


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _settings(arguments: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(
        prog="python -m training.merge", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "base", type=Path, help="a Flux checkpoint's folder, as diffusers writes it"
    )
    parser.add_argument(
        "adapters", type=weighted, nargs="+", metavar="ADAPTER[:WEIGHT]",
        help="a LoRA in diffusers' or kohya's layout, or its run's folder; weight: 1",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="CHECKPOINT")
    parser.add_argument("--scale", type=_number, default=Settings.scale, help="of all adapters: 1")
    parser.add_argument(
        "--dtype", choices=DTYPES, default=Settings.dtype,
        help="of the transformer's weights: keep (default), fp32, bf16 or fp16",
    )  # fmt: skip
    parser.add_argument(
        "--use", choices=licences.USES, default=Settings.use,
        help="what the licences have to allow; private: nothing is passed on (default: research)",
    )  # fmt: skip
    parser.add_argument(
        "--accept-licence", action="append", default=[], metavar="NAME",
        help="a licence that you answer for, having other terms with its owner; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--without-classifier", dest="classifier", action="store_false",
        help="leave the base's classifier/ out, and the terms of what it was made of",
    )  # fmt: skip
    options = vars(parser.parse_args(arguments))
    accepted = tuple(options.pop("accept_licence"))
    return Settings(adapters=tuple(options.pop("adapters")), accepted=accepted, **options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status."""
    settings = _settings(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def work() -> None:
        before = signal.signal(signal.SIGTERM, stop)
        try:
            print(json.dumps(merge(settings)), flush=True)
        finally:
            signal.signal(signal.SIGTERM, before)

    return ended(work, "stopped; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
