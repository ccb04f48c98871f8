"""The checkpoint's side of an export: is it whole, and its small files in the bundle's layout.

Weights are safetensors only. A pickle runs whatever code it holds when it is opened, and is refused
even where a safetensors file is missing.

    >>> require_complete(Path("models/mini"), PARTS)
    >>> write_settings(Checkpoint.open("models/mini"), Path("bundles/mini"))
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from dermaflux.bundle import TOKENIZERS
from dermaflux.checkpoint import Checkpoint
from dermaflux.errors import BundleError
from dermaflux.tokens import Tokens

PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack")
_TOKENIZER_FILES: Final = ("tokenizer.json", "vocab.json", "spiece.model")
"""Any of these makes a tokenizer; transformers converts the older two."""


def folder_of(part: str) -> str:
    """The folder of a checkpoint that holds a part's weights: both VAE parts share one."""
    return "vae" if part.startswith("vae_") else part


def require_complete(checkpoint: Path, parts: Sequence[str]) -> None:
    """Check that all files of the parts are there and readable; weights are not loaded.

    Raises:
        BundleError: everything that is missing, damaged or pickled, in one message.
    """
    if not checkpoint.is_dir():
        raise BundleError(
            f"there is no checkpoint at {checkpoint}; name a folder that "
            "FluxPipeline.save_pretrained wrote"
        )
    problems = list(_problems(checkpoint, parts))
    if problems:
        raise BundleError(
            f"{checkpoint} is not a complete checkpoint: {'; '.join(problems)}. "
            "Write it again with FluxPipeline.save_pretrained, or download what is missing"
        )


def require_weights(part: str, module: nn.Module, checkpoint: Path) -> None:
    """Check that every tensor of an opened part came from the checkpoint.

    transformers and diffusers put random numbers where a tensor is missing, and only warn.

    Raises:
        BundleError: the tensors that are missing.
    """
    folder = checkpoint / folder_of(part)
    found = {key for file in folder.glob("*.safetensors") for key in _keys(file)}
    # transformers 5 drops the outermost name of CLIP's tensors, older checkpoints have it.
    found |= {key.split(".", 1)[1] for key in found if "." in key}
    state: Mapping[str, Tensor] = module.get_submodule("model").state_dict()
    # Tied tensors are stored once, under one of their names.
    stored = {tensor.data_ptr() for name, tensor in state.items() if name in found}
    missing = [
        name
        for name, tensor in state.items()
        if name not in found and (tensor.is_meta or tensor.data_ptr() not in stored)
    ]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise BundleError(
            f"the weights in {folder} lack {', '.join(missing[:3])}{more}; "
            "the file is of another model or was cut"
        )


def write_settings(checkpoint: Checkpoint, bundle: Path, parts: Sequence[str]) -> None:
    """Configs, scheduler and tokenizers, where Optimum's runtime looks for them.

    Raises:
        BundleError: a tokenizer cannot be converted.
    """
    shutil.copyfile(checkpoint.path / "model_index.json", bundle / "model_index.json")
    shutil.copytree(checkpoint.path / "scheduler", bundle / "scheduler")
    for part in parts:
        (bundle / part).mkdir(exist_ok=True)
        config = checkpoint.path / folder_of(part) / "config.json"
        shutil.copyfile(config, bundle / part / "config.json")
    lengths = (checkpoint.model.clip_length, checkpoint.model.text_length)
    for name, length in zip(TOKENIZERS, lengths, strict=True):
        shutil.copytree(checkpoint.path / name, bundle / name, ignore=_ignore_pickles)
        _write_tokenizer(checkpoint.path / name, bundle / name / "tokenizer.json", length)


def _problems(checkpoint: Path, parts: Sequence[str]) -> Iterator[str]:
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        if not (checkpoint / name).is_file():
            yield f"{name} is missing"
    for name in TOKENIZERS:
        if not any((checkpoint / name / file).is_file() for file in _TOKENIZER_FILES):
            yield f"{name}/ has none of {', '.join(_TOKENIZER_FILES)}"
    for name in dict.fromkeys(folder_of(part) for part in parts):
        if not (checkpoint / name / "config.json").is_file():
            yield f"{name}/config.json is missing"
        yield from _weight_problems(checkpoint / name)


def _weight_problems(folder: Path) -> Iterator[str]:
    stem = "model" if _is_transformers(folder) else "diffusion_pytorch_model"
    index = folder / f"{stem}.safetensors.index.json"
    names = {f"{stem}.safetensors"}
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            yield f"{folder.name}/{index.name} is damaged ({error!r})"
            return
    for name in sorted(names):
        where = f"{folder.name}/{name}"
        if not (folder / name).is_file():
            pickles = sorted(file.name for kind in PICKLES for file in folder.glob(kind))
            instead = (
                f" (a pickle, {pickles[0]}, is there and is refused: opening it runs its code)"
                if pickles
                else ""
            )
            yield f"{where} is missing{instead}"
            continue
        try:
            _keys(folder / name)
        except (SafetensorError, OSError) as error:
            yield f"{where} is damaged ({error})"


def _is_transformers(folder: Path) -> bool:
    """Text encoders and the classifier name their weights `model`, diffusers' parts do not."""
    return folder.name not in ("transformer", "vae")


def _keys(file: Path) -> list[str]:
    with safe_open(file, framework="numpy") as tensors:
        return list(tensors.keys())


def _ignore_pickles(folder: str, names: list[str]) -> set[str]:
    return {name for name in names for kind in PICKLES if Path(name).match(kind)}


def _write_tokenizer(source: Path, target: Path, length: int) -> None:
    """`tokenizer.json` with truncation and padding to `length` inside.

    FLUX.1 as downloaded has vocabulary and merges for CLIP, and neither has a length inside.
    """
    from transformers import AutoTokenizer

    try:
        opened: Any = AutoTokenizer.from_pretrained(source)
        tokenizer = Tokenizer.from_str(opened.backend_tokenizer.to_str())
    except Exception as error:  # A dozen kinds, by format and converter.
        raise BundleError(f"{source} is not a tokenizer that can be converted: {error}") from error
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=opened.pad_token_id, pad_token=opened.pad_token)
    tokenizer.save(str(target))
    Tokens.open(target, length)
