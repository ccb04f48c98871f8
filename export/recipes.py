"""How each part is said in each precision: data, read by `export.lower` and `export.quantized`.

Layers are named as in the checkpoint; a pattern is that of a shell (`fnmatch`). A part without a
recipe has no file of that precision, and runs in the bundle's fp32 there.

What the lists rest on:

* Embedders, the last projection and all norms stay high: they are small, and nothing evens their
  errors out. In int8 the embedded default's x_embedder alone, 0.2 % of the weights, would cost more
  (3.0 % of the output) than all blocks together (2.6 %). Modulations are 27 % of FLUX.1's weights
  and cost 0.1 %, so theirs are in 8 bits too (`benchmarks/results/sensitivity_*.json`, made by
  `python -m export.quantize --sensitivity`).
* No block is kept high: the costliest, the last, makes half of the error of all for a ninth of the
  weights.
* Of the decoder only what adds to a sum is in int8: both convolutions of each residual block, 83 %
  of its weights, together 0.3 % off. What everything passes through stays high: its ends would
  put the picture 2.6 % off alone, shortcuts and doublings 1 to 2 %.
* FP8 has one scale per tensor: TensorRT builds a graph with one per channel and then computes it in
  high precision. A floating-point type loses next to nothing by it. int8 has one per channel.
* FP8 is for matrix products; convolutions stay in fp16 there. No engine compared here computes them
  in it, and int8, which OpenVINO does, is theirs: one scale per output channel, grouped ones too. A
  net that is all convolutions has no file in fp8.
* What is not in 8 bits is in fp16: a GPU would else compute attention in fp32, many times slower
  than the products around it. On OpenVINO's CPU it is as fast as fp32 (the ratio of 60 alternated
  steps is 1.00) and runs as many products in int8. Not bf16, which ONNX Runtime's CPU lacks.
* T5 in fp16: `wo` takes products of two activations, which pass 65504 in T5-XXL, and the sum of
  the residuals does; so only products run in fp16, `wo` not at all.
* Text encoders in 8 bits: weights only. They run once an image, and their size is what hurts. T5's
  queries and keys stay high: it does not divide their products by anything, so what comes out of a
  softmax turns over by a small error (they cost the most of all kinds, see
  `benchmarks/results/sensitivity_text_encoder_2_int8_kind.json`), and they are a sixth of T5-XXL.
  T5 has no fp8: over 64 prompts the embedded default's is 43 % of its largest output off at worst,
  and 11 % in int8, of as many bytes. A bundle of both precisions takes that one.

>>> RECIPES["fp8"]["transformer"].kind
'float8e4m3fn'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Final

from dermaflux.engines import (
    OPENVINO,
    OPENVINO_GPU,
    OPENVINO_NPU,
    ORT,
    ORT_CUDA,
    ORT_TENSORRT,
    TENSORRT,
)

PRUNED: Final = "int8-pruned"
"""int8 of a graph that does less work: see `dermaflux.engines.merging`."""
PRECISIONS: Final = ("fp32", "bf16", "fp16", "int8", "fp8", PRUNED)
FILES: Final[Mapping[str, str]] = {
    "fp32": "model.onnx",
    "bf16": "model_bf16.onnx",
    "fp16": "model_fp16.onnx",
    "int8": "model_int8.onnx",
    PRUNED: "model_int8-pruned.onnx",
    "fp8": "model_fp8.onnx",
}
"""Precision -> the name of its file; Optimum opens `model.onnx`."""

MAY_RUN: Final[Mapping[str, tuple[str, ...]]] = {
    "fp32": (OPENVINO, ORT, OPENVINO_GPU, ORT_CUDA, ORT_TENSORRT, TENSORRT),
    # ONNX Runtime's CPU provider has no kernels for bf16 and refuses the file.
    "bf16": (OPENVINO, ORT_CUDA, ORT_TENSORRT, TENSORRT),
    "fp16": (ORT, OPENVINO, OPENVINO_GPU, OPENVINO_NPU, ORT_CUDA, ORT_TENSORRT, TENSORRT),
    # Symmetric int8 wins nothing on ONNX Runtime's CPU kernels, which want unsigned activations: a
    # step of the transformer took 0.9 to 1.1 times that of fp32 there, and on OpenVINO half.
    "int8": (OPENVINO, OPENVINO_GPU, OPENVINO_NPU, ORT_TENSORRT, TENSORRT),
    # Made for CPUs: a GPU has other ways to be fast, and nothing of it has run there.
    PRUNED: (OPENVINO,),
    # ONNX Runtime's TensorRT provider is built against TensorRT 10 and falls back without a word.
    "fp8": (ORT, TENSORRT),
}
"""The matrix: precision -> the engines that may run its files."""

_ONLY: Final[Mapping[tuple[str, str], tuple[str, ...]]] = {
    # GPUs have convolutions in fp16, and none in int8 of this one has run there.
    ("vae_decoder", "int8"): (OPENVINO,),
}
"""Part and precision -> the engines that may run that file, where they are fewer."""


def may_run(part: str, precision: str) -> tuple[str, ...]:
    """The engines that may run a part's file of a precision."""
    return _ONLY.get((part, precision), MAY_RUN[precision])


ENGINES: Final = tuple(dict.fromkeys(name for names in MAY_RUN.values() for name in names))

COMPARED: Final = (OPENVINO, ORT)
"""Engines of any machine that exports: what they may run is run and compared."""

EMULATED: Final[Mapping[str, tuple[str, ...]]] = {"fp8": (ORT,), "fp16": (ORT, OPENVINO)}
"""Where a precision's numbers are right and its speed is not: computed in fp32 from rounded
numbers."""


@dataclass(frozen=True)
class Recipe:
    """One part in one precision.

    `rest` is the type of what is not in 8 bits; `low` the operators that run in `rest` (all where
    it is empty) and `high` the layers that stay in float32 all the same. `kind` is the type in 8
    bits, `layers` the layers in it, `keep` those of them that are not after all, and
    `weights_only` those whose inputs stay high. Without `convolutions` none of those is in it.
    `smooth` is SmoothQuant's alpha. With `attention` queries, keys and values are in it too. With
    `apart` a vision transformer's queries, keys and values are products of their own, and queries
    and keys are in 8 bits (`export.attention`).
    """

    rest: str = "float32"
    low: tuple[str, ...] = ()
    high: tuple[str, ...] = ()
    kind: str | None = None
    layers: tuple[str, ...] = ("*",)
    keep: tuple[str, ...] = ()
    weights_only: tuple[str, ...] = ()
    convolutions: bool = True
    per_channel: bool = False
    smooth: float | None = None
    attention: bool = False
    apart: bool = False

    def quantizes(self, layer: str) -> bool:
        """Whether a layer's weights are in 8 bits."""
        return bool(self.kind) and matches(layer, self.layers) and not matches(layer, self.keep)

    def needs_scale(self, layer: str) -> bool:
        """Whether a layer's inputs are in 8 bits, so that their range must be known."""
        return self.quantizes(layer) and not matches(layer, self.weights_only)


def matches(layer: str, patterns: tuple[str, ...]) -> bool:
    """Whether a layer's name is one of the patterns."""
    return any(fnmatch(layer, pattern) for pattern in patterns)


_MODULATIONS: Final = (
    *("*.norm.linear", "*.norm1.linear", "*.norm1_context.linear"),
    "norm_out.linear",
)
_ENDS: Final = ("x_embedder", "context_embedder", "time_text_embed.*", "proj_out")
_CLASSIFIER: Final = (
    *("patch_embed.*", "conv1", "conv1.*", "conv_stem", "stem", "stem.*", "stem_*"),
    *("head", "head.*", "fc", "classifier"),
    "*.se.*",
)
"""Both ends of timm's nets, as each family calls them, and the gates of squeeze-and-excitation:
small products of one pixel each that scale whole channels."""
_WEIGHTS: Final = ("*",)
_LOGITS: Final = ("*.SelfAttention.q", "*.SelfAttention.k")
"""What T5 looks with; one picture in 64 of the embedded default's went far off by them alone."""
_SMOOTH: Final = 0.5
"""SmoothQuant's own alpha (Xiao et al., arXiv 2211.10438). On the embedded default, eight prompts:
52.5 dB in the median and 50.3 at worst, where it is 44.7 and 41.3 without."""
_T5_FP16: Final = Recipe(rest="float16", low=("MatMul",), high=("*.wo",))
_VAE_INT8: Final = Recipe(
    kind="int8", layers=("*.resnets.*.conv1", "*.resnets.*.conv2"), per_channel=True
)
_VAE_FP16: Final = Recipe(rest="float16", low=("Conv",), high=("decoder.conv_out",))

_CLASSIFIER_INT8: Final = Recipe(
    rest="float16",
    kind="int8",
    # What cuts a picture into patches loses nothing by its weights, and as OpenVINO reads it none
    # of its pixels either (`dermaflux.engines.ov_pixels`).
    keep=tuple(name for name in _CLASSIFIER if name != "patch_embed.*"),
    per_channel=True,
    apart=True,
)

RECIPES: Final[Mapping[str, Mapping[str, Recipe]]] = {
    "fp32": {
        part: Recipe()
        for part in (
            *("text_encoder", "text_encoder_2", "transformer"),
            *("vae_decoder", "vae_encoder", "classifier"),
        )
    },
    "bf16": {
        part: Recipe(rest="bfloat16")
        for part in ("text_encoder", "text_encoder_2", "transformer", "vae_decoder", "classifier")
    },
    "fp16": {
        "text_encoder": Recipe(rest="float16"),
        "text_encoder_2": _T5_FP16,
        "transformer": Recipe(rest="float16"),
        "vae_decoder": _VAE_FP16,
        "classifier": Recipe(rest="float16"),
    },
    "int8": {
        "text_encoder_2": replace(
            _T5_FP16, kind="int8", keep=_LOGITS, weights_only=_WEIGHTS, per_channel=True
        ),
        "transformer": Recipe(
            rest="float16",
            kind="int8",
            keep=_ENDS,
            weights_only=_MODULATIONS,
            per_channel=True,
            smooth=_SMOOTH,
        ),
        "vae_decoder": _VAE_INT8,
        "classifier": _CLASSIFIER_INT8,
    },
    PRUNED: {"classifier": _CLASSIFIER_INT8},
    "fp8": {
        "transformer": Recipe(
            rest="float16", kind="float8e4m3fn", keep=_ENDS, weights_only=_MODULATIONS
        ),
        "classifier": Recipe(
            rest="float16", kind="float8e4m3fn", keep=_CLASSIFIER, convolutions=False
        ),
    },
}
"""Precision -> part -> recipe."""
