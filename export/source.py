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

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dermaflux import vocabulary
from dermaflux.bundle import TOKENIZERS
from dermaflux.checkpoint import INTAKE, STATISTICS, Checkpoint
from dermaflux.engines import parts
from dermaflux.errors import BundleError
from export import tokenizer


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
    shutil.copytree(checkpoint.path / "scheduler", bundle / "scheduler")
    for part in parts:
        (bundle / part).mkdir(exist_ok=True)
        config = checkpoint.path / folder_of(part) / "config.json"
        shutil.copyfile(config, bundle / part / "config.json")
    if "classifier" in parts and checkpoint.classifier and checkpoint.classifier.intake:
        file = checkpoint.classifier.intake.file
        shutil.copyfile(checkpoint.path / file, bundle / file)
    tokenizer.write(checkpoint, bundle)


def _problems(checkpoint: Path, parts: Sequence[str]) -> Iterator[str]:
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        if not (checkpoint / name).is_file():
            yield f"{name} is missing"
    for name in TOKENIZERS:
        yield from vocabulary.problems(checkpoint / name)
    gated = "classifier" in parts and (checkpoint / INTAKE).is_file()
    if gated and not (checkpoint / STATISTICS).is_file():
        yield f"{STATISTICS}, which python -m training.intake makes, is missing"
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
            yield f"{where} is missing{parts.pickled(folder)}"
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
