"""The options of `python -m training.vit`: every setting of a recipe, by its own name.

    >>> options = parser().parse_args(["--data", "ISIC2017", "--out", "runs/vit", "--steps", "400"])
    >>> recipe_of(options, None).steps
    400

What is not given stays as the recipe has it, with `--pretrained` as `training.recipe.fine` has it.
"""

from __future__ import annotations

import argparse
import json
from argparse import ArgumentParser, Namespace
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

from training import data, recipe
from training.data import DatasetError
from training.mixing import RATIO_BY
from training.pretrained import Pretrained
from training.recipe import Recipe

_CHOICES: Final = {
    "schedule": recipe.SCHEDULES, "optimizer": recipe.OPTIMIZERS, "sampling": recipe.SAMPLINGS,
    "augment": recipe.AUGMENTS, "watch": recipe.WATCHED, "precision": recipe.PRECISIONS,
    "device": recipe.DEVICES,
}  # fmt: skip
_OWN: Final = ("architecture", "model_args", "auxiliary", "mean", "std", "interpolation")
"""Fields that have an option of another kind, or none."""
_COUNTS: Final = ("size", "steps", "batch", "accumulate", "threads")


def parser(prog: str, description: str | None) -> ArgumentParser:
    """All options; see `training.recipe.Recipe` for what the settings mean."""
    made = ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--data", type=Path, action="append", required=True, help="repeatable")
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--work", type=Path, help="state to save and resume from")
    made.add_argument("--start", type=Path, help="another run's state, to begin from")
    made.add_argument(
        "--leave-out", action="store_true",
        help="train without the pictures that stand, or nearly stand, in a test split too; without "
        "this they are listed and nothing is trained",
    )  # fmt: skip
    made.add_argument(
        "--seen", type=Path, help="write an index of what was seen (python -m training.data leaks)"
    )
    mixing = made.add_argument_group("which pictures are learnt")
    mixing.add_argument(
        "--synthetic", type=Path, action="append", default=[],
        help="generated pictures, for training alone; repeatable",
    )  # fmt: skip
    mixing.add_argument(
        "--ratio", type=data.positive,
        help="synthetic pictures over real training pictures; without it, all are taken",
    )  # fmt: skip
    mixing.add_argument(
        "--ratio-by", choices=RATIO_BY, default="real",
        help="labels of the synthetic pictures: as of the real ones, or half of each label",
    )  # fmt: skip
    mixing.add_argument("--limit", type=data.count, help="real training pictures; all without it")
    model = made.add_argument_group("the model")
    model.add_argument("--model", help="timm's name, such as resnext50_32x4d")
    model.add_argument("--model-args", type=_mapping, help="JSON, for timm.create_model")
    model.add_argument(
        "--pretrained", type=Path, help="timm's folder of weights, or a file; nothing is downloaded"
    )
    training = made.add_argument_group(
        "the training, as in training.recipe (steps go before epochs, and epochs before hours)"
    )
    training.add_argument("--auxiliary", choices=("on", "off"), help="heads beside the label's")
    kinds = {"int": int, "float": float, "str": str}
    for one in fields(Recipe):
        if one.name in _OWN:
            continue
        kind: Any = kinds[str(one.type).removesuffix(" | None")]
        if one.name in _COUNTS:
            kind = data.count
        training.add_argument(
            f"--{one.name.replace('_', '-')}", type=data.positive if one.name == "hours" else kind,
            choices=_CHOICES.get(one.name),
            help=one.metadata["help"] + ("" if one.default is None else f" ({one.default})"),
        )  # fmt: skip
    return made


def recipe_of(options: Namespace, weights: Pretrained | None) -> Recipe:
    """The recipe that the options ask for.

    Raises:
        DatasetError: weights in a bare file without a model's name, or those of another model.
        RecipeError: a setting is out of range.
    """
    given: dict[str, Any] = {
        one.name: getattr(options, one.name)
        for one in fields(Recipe)
        if one.name not in _OWN and getattr(options, one.name) is not None
    }
    if options.auxiliary is not None:
        given["auxiliary"] = options.auxiliary == "on"
    base = Recipe()
    if options.model is None and weights is None:
        size = given.get("size", base.size)
        args = {**base.model_args, "img_size": size, **(options.model_args or {})}
        return replace(base, **{"model_args": args, "margin": _margin(size, base), **given})
    architecture = options.model or (weights.architecture if weights else None)
    if architecture is None:
        raise DatasetError(
            f"--pretrained {options.pretrained} is a file that does not say of which model it is; "
            "give --model, and --model-args where the model was built with some"
        )
    args = {**(weights.model_args if weights else {}), **(options.model_args or {})}
    recipe.local(architecture, args)  # before timm is asked for anything
    known = weights.config.get("input_size") if weights else None
    size = given.get("size") or int((known or _input_size(architecture))[-1])
    if "img_size" not in (options.model_args or {}):
        args = _sized(architecture, args, size)
    margin = _margin(size, base)
    base = replace(base, architecture=architecture, model_args=args, size=size, margin=margin)
    if weights is not None:
        base = recipe.fine(weights.asked(base))
    return replace(base, **given)


def _margin(size: int, base: Recipe) -> int:
    """Pictures are kept an eighth larger than the model sees them, whatever the size."""
    return size * base.margin // base.size


def _input_size(architecture: str) -> tuple[int, ...]:
    import timm

    found = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    return tuple(found.input_size) if found else (3, 224, 224)


def _sized(architecture: str, args: dict[str, Any], size: int) -> dict[str, Any]:
    """The arguments with `img_size`, for models that are built for one size."""
    import timm
    import torch

    try:
        with torch.device("meta"):
            timm.create_model(architecture, **{**args, "img_size": size})
    except (TypeError, RuntimeError, ValueError, AssertionError):
        # Either it takes none, or cannot be built at all, which `classifier.build` tells.
        return {name: value for name, value in args.items() if name != "img_size"}
    return {**args, "img_size": size}


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object, such as {{"depth": 6}}')
    return found
