"""The forms of `bundle.json`: one frozen dataclass per JSON object, read strictly.

Keys are fields, their types are the types needed; `dermaflux.bundle.Bundle` is the whole of it and
opens it. Values that have the right type and no sense are refused by `check_values`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from dermaflux.errors import BundleError

DTYPES: Final = ("float32", "int64")
"""What graphs take and give, whatever precision they have inside."""


@dataclass(frozen=True)
class Tensor:
    """One input or output of a graph. A dimension is a number, or the name of a free one."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Data:
    """A file, its path relative to the bundle's folder with forward slashes."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class PartParity:
    """How far a graph is from the eager part: largest error, the same relative to the largest
    output, and the relative error at which the export refuses."""

    max_abs: float
    relative: float
    tolerance: float


@dataclass(frozen=True)
class File:
    """One precision of one part. `engines` names who may run it, `data` is its external data.

    `compared` are the engines that the figures of `parity` are the worst of; without a comparison
    there are none. `emulated` are engines that compute in fp32 with numbers of this precision:
    right for parity, of no use for speed. `quantized_ops` counts by engine, in the graph that it
    executes, the operations in each type: {"openvino-cpu": {"FullyConnected": {"i8": 44}}}.
    """

    path: str
    bytes: int
    sha256: str
    data: tuple[Data, ...]
    engines: tuple[str, ...]
    compared: tuple[str, ...]
    emulated: tuple[str, ...]
    quantized_ops: Mapping[str, Any]
    parity: PartParity | None


@dataclass(frozen=True)
class Part:
    """A graph: its tensors, and its files by precision."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    files: Mapping[str, File]


@dataclass(frozen=True)
class ModelSpec:
    """What the pipeline must know of the generator's architecture."""

    latent_channels: int
    scale: int
    scaling_factor: float
    shift_factor: float
    text_length: int
    clip_length: int
    guidance_embeds: bool


@dataclass(frozen=True)
class Defaults:
    """What a request gets that does not say otherwise."""

    steps: int
    guidance: float | None
    height: int
    width: int


@dataclass(frozen=True)
class Limits:
    """What a request may ask for; sizes in pixels, each side."""

    min_size: int
    max_size: int
    size_multiple: int
    max_steps: int
    max_batch: int


@dataclass(frozen=True)
class IntakeSpec:
    """Which pictures the classifier judges; see `dermaflux.intake`.

    `file` holds the statistics, relative to the bundle's (or the checkpoint's) folder; `min_side`
    is in pixels; the next six are limits of `dermaflux.appearance.Quality`, the last three the
    least logarithms of two densities and of the odds against other textures.
    """

    file: str
    min_side: int
    light: float
    shade: float
    clipped: float
    contrast: float
    sharpness: float
    grain: float
    appearance: float
    features: float
    textures: float


@dataclass(frozen=True)
class ClassifierSpec:
    """Pre-processing and reading of the classifier; `input_size` is (3, height, width). Without
    `intake` every picture is judged."""

    classes: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    temperature: float
    threshold: float
    abstain: tuple[float, float]
    intake: IntakeSpec | None = None


@dataclass(frozen=True)
class ImageParity:
    """PSNR in dB and SSIM (1 is equal) of whole images against eager ones in fp32 of the same
    seeds, over `prompts` prompts; LPIPS (0 is equal) where the export was given its weights. The
    export refuses a median below `tolerance_db`, and a worst image below `tolerance_worst_db`."""

    prompts: int
    steps: int
    psnr_median_db: float
    psnr_worst_db: float
    ssim_median: float
    ssim_worst: float
    tolerance_db: float
    tolerance_worst_db: float
    lpips_median: float | None = None
    lpips_worst: float | None = None


@dataclass(frozen=True)
class ClassifierParity:
    """Largest change of a probability against eager, over `images` pictures; on photographs with
    labels also the area under the ROC curve, and that of eager fp32."""

    max_probability_change: float
    images: int
    auc: float | None
    auc_eager: float | None


@dataclass(frozen=True)
class Parity:
    """Whole-pipeline parity: images by precision and engine, classifier by precision."""

    images: Mapping[str, Mapping[str, ImageParity]]
    classifier: Mapping[str, ClassifierParity]


@dataclass(frozen=True)
class Golden:
    """An image made at export: a bundle that runs rightly makes it again within the tolerance."""

    request: Mapping[str, Any]
    image: str
    tolerance_db: float


@dataclass(frozen=True)
class Licence:
    """The licence of one ingredient."""

    name: str
    licence: str
    attribution: str


def check_values(
    model: ModelSpec, defaults: Defaults, limits: Limits, classifier: ClassifierSpec | None
) -> None:
    """Refuse numbers that contradict each other.

    Raises:
        BundleError: with the value and the rule it breaks.
    """
    for holds, rule in _rules(model, defaults, limits, classifier):
        if not holds:
            raise BundleError(f"bundle.json: {rule}")


def _rules(
    model: ModelSpec, defaults: Defaults, limits: Limits, classifier: ClassifierSpec | None
) -> Iterator[tuple[bool, str]]:
    counts = (
        *(model.latent_channels, model.scale, model.text_length, model.clip_length),
        *(limits.min_size, limits.size_multiple, limits.max_steps, limits.max_batch),
    )
    yield min(counts) > 0, "model and limits need numbers above 0"
    yield model.scaling_factor != 0, "model.scaling_factor is 0"
    token = 2 * model.scale
    yield (
        limits.size_multiple % token == 0,
        f"limits.size_multiple {limits.size_multiple} is not a multiple of a token's {token} px",
    )
    for name in ("min_size", "max_size"):
        size = getattr(limits, name)
        yield (
            size % limits.size_multiple == 0,
            f"limits.{name} {size} is not a multiple of {limits.size_multiple}",
        )
    for name in ("height", "width"):
        size = getattr(defaults, name)
        yield (
            limits.min_size <= size <= limits.max_size and size % limits.size_multiple == 0,
            f"defaults.{name} {size} is outside of limits",
        )
    yield (
        1 <= defaults.steps <= limits.max_steps,
        f"defaults.steps {defaults.steps} is not in 1 to {limits.max_steps}",
    )
    yield (
        model.guidance_embeds == (defaults.guidance is not None),
        f"defaults.guidance {defaults.guidance} contradicts guidance_embeds "
        f"{model.guidance_embeds}",
    )
    if classifier is None:
        return
    low, high = classifier.abstain
    yield "malignant" in classifier.classes, "classifier.classes has no 'malignant'"
    yield classifier.input_size[0] == 3, "classifier.input_size needs 3 channels first"
    yield min(classifier.input_size) > 0, "classifier.input_size needs numbers above 0"
    yield min(classifier.std) > 0, "classifier.std needs numbers above 0"
    yield 0 < classifier.crop_pct <= 1, "classifier.crop_pct needs a number above 0, up to 1"
    yield classifier.temperature > 0, "classifier.temperature needs a number above 0"
    yield 0 <= classifier.threshold <= 1, "classifier.threshold needs a probability"
    yield 0 <= low <= high <= 1, "classifier.abstain needs two probabilities, the lower first"
    if classifier.intake is not None:
        yield classifier.intake.min_side > 0, "classifier.intake.min_side needs a number above 0"
        yield (
            0 <= classifier.intake.clipped <= 1,
            "classifier.intake.clipped needs a share, 0 to 1",
        )
