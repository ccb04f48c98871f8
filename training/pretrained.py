"""Pretrained weights of timm, from a local folder or file, into a model of another size and head.

    >>> weights = Pretrained.open(Path("weights/vit_base_patch16_224.augreg_in21k"))
    >>> recipe = weights.asked(Recipe(size=224))       # its mean, deviation, crop and interpolation
    >>> weights.into(build(recipe))
    Fitted(used=150, missing=('head.weight', 'head.bias'), unexpected=(), other_shape=())

A folder is timm's own layout, `config.json` with `model.safetensors` (or `pytorch_model.bin`), as
`training.vit` writes it too; a file is a .safetensors, or what `torch.load(weights_only=True)`
takes. The head is left as the model has it; position embeddings are resampled by the function that
timm has for the architecture. Nothing is downloaded.
"""

from __future__ import annotations

import inspect
import json
import logging
import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from timm.models import clean_state_dict
from torch import Tensor, nn

from dermaflux.bundle import sha256
from dermaflux.licence import Ingredient, combined
from training import states
from training.data import DatasetError
from training.recipe import Recipe, local

log = logging.getLogger(__name__)

_FILES: Final = ("model.safetensors", "pytorch_model.bin")
_INSIDE: Final = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Under which keys trainers save weights, in timm's order."""
_HEADS: Final = ("head.", "head_dist.", "fc_norm.")
"""What timm's models may end in beside their classifier; it goes with another task."""
_OWN: Final = ("pos_embed", "rel_pos", "relative_position", "attn_mask", "num_batches_tracked")
"""Parts of names of tensors that follow the size of pictures, or count batches."""


@dataclass(frozen=True)
class Fitted:
    """How weights fitted a model: tensors used, and the names of those that were not.

    `missing` are the model's that the file lacks, its head among them; `unexpected` the file's that
    the model lacks; `other_shape` those of another shape in both.
    """

    used: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    other_shape: tuple[str, ...]


@dataclass(frozen=True)
class Pretrained:
    """Opened weights. `config` is what their `config.json` says, empty for a bare file."""

    name: str
    tensors: Mapping[str, Tensor]
    architecture: str | None
    config: Mapping[str, Any]
    model_args: Mapping[str, Any]
    history: states.History

    @classmethod
    def open(cls, path: Path) -> Pretrained:
        """Read a folder or file.

        Raises:
            DatasetError: it is neither, or holds no weights.
            RecipeError: its config.json would have timm fetch something.
        """
        described: Mapping[str, Any] = {}
        file = path
        if path.is_dir():
            file = next((path / name for name in _FILES if (path / name).is_file()), path)
            if file == path:
                raise DatasetError(f"{path} has no {' or '.join(_FILES)}; give timm's folder")
            described = _json(path / "config.json")
        elif not path.is_file():
            raise DatasetError(
                f"--pretrained {path} is no folder and no file; give timm's folder (config.json, "
                "model.safetensors) or a file of weights"
            )
        # Before timm 0.9 the folder's settings were not under a key of their own.
        config = described.get("pretrained_cfg") or described
        architecture, args = described.get("architecture"), described.get("model_args") or {}
        if not isinstance(architecture, str | None) or not isinstance(args, Mapping):
            raise DatasetError(f"{path}/config.json is not timm's: architecture or model_args")
        local(architecture or "", args)
        return cls(
            name=path.resolve().name,
            tensors=_tensors(file),
            architecture=architecture,
            config=config,
            model_args=args,
            history=_history(path, file, str(config.get("license") or "")),
        )

    def asked(self, recipe: Recipe) -> Recipe:
        """A recipe with the mean, deviation, interpolation and crop that the weights learnt with.

        Raises:
            DatasetError: the weights are of another architecture than the recipe.
        """
        if self.architecture and _base(self.architecture) != _base(recipe.architecture):
            raise DatasetError(
                f"the weights {self.name} are of {self.architecture}, not {recipe.architecture}; "
                "leave --model out"
            )
        known = {name: self.config[name] for name in ("mean", "std") if name in self.config}
        values: dict[str, Any] = {name: tuple(map(float, value)) for name, value in known.items()}
        if str(self.config.get("interpolation", "")).upper() in Image.Resampling.__members__:
            values["interpolation"] = str(self.config["interpolation"])
        if self.config.get("crop_pct"):
            values["crop_pct"] = min(float(self.config["crop_pct"]), 1.0)
        return replace(recipe, **values)

    def into(self, model: nn.Module, architecture: str) -> Fitted:
        """Load what fits; the head stays as it is.

        Raises:
            DatasetError: a tensor of the body is missing or of another shape, position embeddings
                aside, or holds what is no finite number; with counts and names.
        """
        vit: Any = model
        tensors = dict(self.tensors)
        module = sys.modules[timm.model_entrypoint(_base(architecture)).__module__]
        for name in ("checkpoint_filter_fn", "_filter_fn"):
            if hasattr(module, name):
                convert = getattr(module, name)
                alone = len(inspect.signature(convert).parameters) == 1  # RegNet's
                try:
                    tensors = convert(tensors) if alone else convert(tensors, model)
                except (KeyError, RuntimeError, ValueError, AttributeError, IndexError) as error:
                    log.info("timm cannot convert these weights (%s); taken as they are", error)
                break
        wanted = model.state_dict()
        heads = vit.pretrained_cfg.get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else heads
        ends = tuple(f"{head}." for head in heads)
        body = {name: value for name, value in wanted.items() if not name.startswith(ends)}
        tensors = {name: value for name, value in tensors.items() if not name.startswith(ends)}
        used = {n: v for n, v in tensors.items() if n in body and v.shape == body[n].shape}
        fitted = Fitted(
            used=len(used),
            missing=tuple(name for name in wanted if name not in tensors),
            unexpected=tuple(name for name in tensors if name not in body),
            other_shape=tuple(name for name in tensors if name in body and name not in used),
        )
        needed = [n for n in body if not n.startswith(_HEADS) and not any(o in n for o in _OWN)]
        if lacking := [name for name in needed if name not in used]:
            raise DatasetError(
                f"the weights {self.name} do not fit {architecture}: {len(used)} of its "
                f"{len(body)} tensors are there, "
                f"{len(body) - len(used) - len(fitted.other_shape)} are missing, "
                f"{len(fitted.other_shape)} are of another shape and {len(fitted.unexpected)} of "
                f"the file's are of no use (it lacks {_first(lacking)}); name the model that they "
                "are of as --model, with --model-args where it was built with some"
            )
        if broken := [name for name, value in used.items() if not bool(value.isfinite().all())]:
            raise DatasetError(
                f"the weights {self.name} hold numbers that are not finite in {len(broken)} of "
                f"{len(used)} tensors ({_first(broken)}): the file is damaged, or its training "
                "diverged; give another"
            )
        model.load_state_dict({**wanted, **used})
        for what in ("missing", "unexpected", "other_shape"):
            names = [name for name in getattr(fitted, what) if not name.startswith(ends)]
            if names:
                log.info("%s: %d %s: %s", self.name, len(names), what, _first(names))
        log.info("%s: %d of %d tensors loaded", self.name, len(used), len(body))
        return fitted


def _first(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def _base(architecture: str) -> str:
    """timm's names are model.tag; the tag names the weights."""
    return architecture.split(".")[0]


def _json(file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{file} cannot be read: {error}; give timm's folder") from error
    if not isinstance(found, dict):
        raise DatasetError(f"{file} holds no JSON object; give timm's folder")
    return found


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
        for key in _INSIDE:
            if isinstance(found, dict) and isinstance(found.get(key), Mapping):
                found = found[key]
                break
        named = clean_state_dict(found)
        tensors = {
            str(name): value.float() if value.is_floating_point() else value
            for name, value in named.items()
            if isinstance(value, Tensor)
        }
    except (OSError, EOFError, ValueError, TypeError, AttributeError, RuntimeError, KeyError,
            SafetensorError, pickle.UnpicklingError) as error:  # fmt: skip
        said = " ".join(str(error).split())[:160]
        raise DatasetError(f"{file} cannot be read as weights ({said})") from error
    if not tensors:
        raise DatasetError(f"{file} holds no tensors")
    return tensors


def _history(path: Path, file: Path, licence: str) -> states.History:
    """What the weights saw: what a report of ours beside them says, else the weights by name."""
    name = path.resolve().name
    own = {"name": name, "kind": "weights", "attribution": name, "sha256": sha256(file)}
    report = _json(path / "report.json") if (path / "report.json").is_file() else {}
    saw = report.get("saw")
    if isinstance(saw, list) and all(isinstance(one, dict) for one in saw):
        pairs = tuple((str(one.get("source")), str(one.get("licence") or "")) for one in saw)
        before = [one for one in report.get("ingredients") or [] if isinstance(one, dict)]
        terms = combined([*(Ingredient(*pair) for pair in pairs), *map(Ingredient.of, before)])
        own["licence"] = terms.licence or licence or ("Apache-2.0" if pairs else "")
        return states.History(name, pairs, ingredients=(own, *before))
    source = f"{name}{states.PRETRAINED}"
    own |= {"source": source, "licence": licence}
    return states.History(name, ((source, licence),), ingredients=(own,))
