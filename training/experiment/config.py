"""The experiment's settings: a YAML file, read strictly.

    real: datasets/isic2017
    sizes: [500, 2117]
    ratios: [0, 1.75]
    seeds: 5
    model: {size: 64, steps: 800, model_args: {img_size: 64, patch_size: 8, ...}}
    generators:
      mini: {data: generated/mini, saw: runs/mini/seen.npz}
    arms: [real, added]

    >>> Config.read(Path("docs/experiment.yaml")).sizes
    (500, 2117)

A key that nobody knows is an error, so is a key that stands there twice, and so is whatever would
make the arms unequal. Paths are relative to the folder that the command is run in.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from dermaflux import strict
from dermaflux.errors import BundleError, DatasetError
from training.mixing import RATIO_BY
from training.recipe import Recipe, RecipeError

REAL, ADDED, ONLY, CLASSIC, WEIGHTS, UPPER = ARMS = (
    "real", "added", "synthetic-only", "classic", "class-weights", "upper",
)  # fmt: skip
"""Real pictures alone; real and synthetic; synthetic alone; real with strong augmentation, with
class weights; all the real training pictures that a generator saw."""

_EVERY: Final = {
    "auxiliary": False, "zoom": 0.0, "sampling": "shuffled", "augment": "classic", "threads": 1,
}  # fmt: skip
"""Defaults of every arm. Auxiliary heads and zooms to the lesion learn from masks, diagnoses and
structures, which synthetic pictures have not: arms would differ in more than their pictures. Every
picture is shown equally often, so that a ratio of 1.75 is one."""
_NOT_HERE: Final = {
    "seed": "seeds vary by run; give the number of them as seeds",
    "hours": "every arm takes the same number of steps; give steps",
    "epochs": "every arm takes the same number of steps; give steps",
    "patience": "every arm takes the same number of steps; leave it out",
    "save_minutes": "a killed run is made again from its start; leave it out",
}
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Model:
    """A recipe of all runs but for seed and what an arm changes.

    `pretrained` are the weights that every run begins with, and `saw` the lesions that those have
    seen: dataset folders (their train split), or indices of pictures (`.npz`).
    """

    recipe: Recipe
    pretrained: str | None = None
    saw: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Generator:
    """Where a generator's pictures are, and what it and its captions have seen.

    Attributes:
        data: a dataset of generated pictures.
        saw: dataset folders (their train split), or indices of pictures (`.npz`).
        sizes: the real subsets it is for; all, if none are given.
        subset: it claims to have seen nothing but the real subset of `sizes`.
        cpu_hours, gpu_hours: what its training and its pictures cost, for the table of costs.
    """

    data: str
    saw: str | tuple[str, ...]
    sizes: tuple[int, ...] = ()
    subset: bool = False
    cpu_hours: float | None = None
    gpu_hours: float | None = None

    @property
    def seen(self) -> tuple[Path, ...]:
        """The paths of `saw`."""
        return _paths(self.saw)


@dataclass(frozen=True)
class Config:
    """What the file says.

    Attributes:
        real: a dataset; its train split is what sizes are of, its val chooses thresholds, its test
            is the test.
        external: further datasets whose test split is a test.
        sizes: numbers of real pictures. ratios: synthetic ones for each of them; 0 is the arm real.
        seeds: how many runs of each cell, with seeds 0, 1, ...
        ratio_by: whether synthetic pictures have the labels' shares of the real ones ("real"), or
            half of each ("label").
    """

    real: str
    sizes: tuple[int, ...]
    seeds: int
    model: Mapping[str, Any] | None = None
    models: Mapping[str, Mapping[str, Any]] | None = None
    external: tuple[str, ...] = ()
    ratios: tuple[float, ...] = (0.0,)
    ratio_by: str = "real"
    generators: Mapping[str, Generator] = field(default_factory=dict)
    arms: tuple[str, ...] = (REAL, ADDED)

    @classmethod
    def read(cls, file: Path) -> Config:
        """The settings of a YAML file.

        Raises:
            DatasetError: it cannot be read, or says what no experiment can do; with the key.
        """
        try:
            config = strict.read(cls, _yaml(file), str(file))
            config._checked()
            config.recipes()
        except (BundleError, DatasetError) as error:
            said = str(error)
            raise DatasetError(said if said.startswith(str(file)) else f"{file}: {said}") from error
        return config

    def recipes(self) -> dict[str, Model]:
        """The models by name; the only one without a name is "model".

        Raises:
            BundleError: a key is unknown or its value of another type.
            DatasetError: a value is not one of those that are known, or would make arms unequal.
        """
        given = self.models if self.models is not None else {"model": self.model or {}}
        return {name: _model(name, said) for name, said in given.items()}

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def of_size(self, size: int) -> list[str]:
        """The generators that are for a real subset of `size`."""
        return [name for name, one in self.generators.items() if not one.sizes or size in one.sizes]

    def _checked(self) -> None:
        if (self.model is None) == (self.models is None):
            raise DatasetError("give either model or models")
        for key, values in (("sizes", self.sizes), ("ratios", self.ratios), ("arms", self.arms)):
            if not values:
                raise DatasetError(f"{key} is empty")
            if len(set(values)) < len(values):
                raise DatasetError(f"{key} names one twice: {list(values)}")
        if min(self.sizes) < 2:
            raise DatasetError(f"sizes has {min(self.sizes)}; each needs two pictures or more")
        if min(self.ratios) < 0:
            raise DatasetError(f"ratios has {min(self.ratios):g}; 0 is the least")
        if self.seeds < 1:
            raise DatasetError(f"seeds is {self.seeds}; the number of runs of a cell, 1 or more")
        if self.ratio_by not in RATIO_BY:
            raise DatasetError(f"ratio_by {self.ratio_by!r} is not one of {', '.join(RATIO_BY)}")
        if unknown := [arm for arm in self.arms if arm not in ARMS]:
            raise DatasetError(f"arms has {unknown[0]!r}; known: {', '.join(ARMS)}")
        for name in (*self.generators, *(self.models or {})):
            if not _NAME.fullmatch(name):
                raise DatasetError(f"{name!r} is no name; use letters, digits, dots and dashes")
        for name, one in self.generators.items():
            if not one.seen:
                raise DatasetError(f"generators.{name}.saw is empty; say what it has seen")
            if other := sorted(set(one.sizes) - set(self.sizes)):
                raise DatasetError(f"generators.{name}.sizes has {other[0]}, which sizes has not")
            if one.subset and len(one.sizes) != 1:
                raise DatasetError(
                    f"generators.{name}.subset needs one of sizes: which real subset did it see?"
                )
        needs = [arm for arm in self.arms if arm in (ADDED, ONLY, UPPER)]
        if needs and not self.generators:
            raise DatasetError(f"arm {needs[0]} needs generators, and there are none")


def _model(name: str, said: Mapping[str, Any]) -> Model:
    where = f"models.{name}"
    for key, why in _NOT_HERE.items():
        if key in said:
            raise DatasetError(f"{where} has {key}: {why}")
    values = dict(said)
    pretrained = values.pop("pretrained", None)
    if pretrained is not None and not isinstance(pretrained, str):
        raise DatasetError(f"{where}.pretrained needs a path, not {pretrained!r}")
    saw = values.pop("saw", None)
    if (saw is None) != (pretrained is None):
        lacking = ("pretrained", "saw") if pretrained is None else ("saw", "pretrained")
        raise DatasetError(
            f"{where} has {lacking[1]} without {lacking[0]}: say which lesions the weights have "
            "seen, [] for none (as those of ImageNet)"
        )
    listed = [saw] if isinstance(saw, str) else saw or []
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise DatasetError(f"{where}.saw needs a path or a list of paths, not {saw!r}")
    if "architecture" in values:
        # The default's arguments are those of the default's architecture.
        values.setdefault("model_args", {})
    try:
        recipe = strict.read(Recipe, _EVERY | values, where)
    except RecipeError as error:
        raise DatasetError(f"{where}: {error}") from error
    if recipe.steps is None or recipe.steps < 1:
        raise DatasetError(f"{where} has no steps; every arm takes as many of the optimizer's")
    if recipe.auxiliary:
        raise DatasetError(
            f"{where}.auxiliary: synthetic pictures have no masks and no experts' structures, so "
            "arms would differ in more than their pictures; leave it out"
        )
    return Model(recipe, pretrained, _paths(tuple(listed)))


def _paths(saw: str | tuple[str, ...]) -> tuple[Path, ...]:
    return tuple(Path(one) for one in ([saw] if isinstance(saw, str) else saw))


def changed(recipe: Recipe, arm: str, seed: int) -> Recipe:
    """The recipe of a run.

    `classic` has strong augmentation for dermoscopy (any turn, crops, light), against the light one
    of all other arms; `class-weights` weighs the loss by 1 / share of the label, every picture
    shown equally often.

    Raises:
        DatasetError: the arm would be the same as `real`.
    """
    recipe = replace(recipe, seed=seed)
    match arm:
        case "classic":
            if recipe.augment == "dermoscopy":
                raise DatasetError(
                    "arm classic is arm real: augment is dermoscopy already; give augment: classic "
                    "or none, or leave the arm out"
                )
            return replace(recipe, augment="dermoscopy")
        case "class-weights":
            if recipe.class_weights != "none":
                raise DatasetError("arm class-weights is arm real: class_weights is set already")
            return replace(recipe, class_weights="balanced", sampling="shuffled")
    return recipe


def _yaml(file: Path) -> Any:
    """The file's value.

    Raises:
        DatasetError: it cannot be read, is no YAML, or has a key twice.
    """
    yaml: Any = importlib.import_module("yaml")  # it has no types of its own
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise DatasetError(f"{file} cannot be read: {said}") from error

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Refuses a key that stands there twice; takes 1e-3 for a number, as everybody does."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for number, key in enumerate(keys):
                if key in keys[:number]:
                    line = node.value[number][0].start_mark.line + 1
                    raise DatasetError(f"{file}, line {line}: {key!r} stands there twice")
            return dict(super().construct_mapping(node, deep))

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )  # fmt: skip
    try:
        return yaml.load(text, Loader)  # a SafeLoader: plain values alone
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise DatasetError(f"{file} is not YAML: {said}") from error
