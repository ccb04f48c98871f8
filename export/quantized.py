"""A graph and a table of scales -> the same graph in 8 bits, as standard Q and DQ.

A layer (MatMul, Gemm or Conv with constant weights) becomes

    x -> [Mul by 1 / smooth] -> QuantizeLinear -> DequantizeLinear -> layer <- DequantizeLinear <- W

symmetric everywhere, with zero points 0: what TensorRT takes and what OpenVINO runs fastest. A
layer whose weights only are quantized lacks the pair at x. Sums go on in the type of the rest.

The nodes are put in here, and not by ONNX Runtime's quantizer or ModelOpt's, because both load the
whole model, several times over, and run it to calibrate: a FLUX.1 takes over 100 GB there. Here
weights are quantized on their way from the shard to the file (`export.weights`), and ranges come
from a table that was made wherever the model fits (`export.calibrate`). Integers and scales are
those of ONNX Runtime's quantizer (the tests compare).

    >>> quantized(model, RECIPES["int8"]["transformer"], table["transformer"])
    44
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_ir
import onnx_ir.passes.common
from numpy.typing import NDArray

from dermaflux.errors import EngineError
from export.recipes import Recipe
from export.weights import converted, lazy

PRODUCTS: Final = ("MatMul", "Gemm", "Conv")
LARGEST: Final[Mapping[str, float]] = {"int8": 127.0, "float8e4m3fn": 448.0}
"""The largest number of a type; int8's -128 is not used, since it has no opposite."""
_LEAST_STEP: Final = 2.0**-20
"""Of which fp16 still has four digits; what is smaller than a step is noise beside any weight."""
_TYPES: Final = {
    "int8": onnx_ir.DataType.INT8,
    "float8e4m3fn": onnx_ir.DataType.FLOAT8E4M3FN,
}

FACTORS: Final = ("query", "key", "value")
"""What attention multiplies, in the order of its inputs; their ranges stand behind its name."""

Channels = Mapping[str, NDArray[np.float32]]
"""Layer -> the largest magnitude that each of its input channels was seen with."""


@dataclass(frozen=True)
class Place:
    """New nodes go before `node`, and are called after `stem`."""

    node: onnx_ir.Node
    stem: str


@dataclass(frozen=True)
class Layer:
    """A product with constant weights. `axis` counts its outputs, `inward` its inputs."""

    node: onnx_ir.Node
    weight: onnx_ir.Value
    axis: int
    inward: int

    @property
    def name(self) -> str:
        """The layer's name in the checkpoint."""
        return str(self.node.name)

    @property
    def place(self) -> Place:
        """Where its new nodes go."""
        return Place(self.node, self.name)

    @property
    def width(self) -> int:
        """Input channels; a grouped convolution's are those of one group."""
        assert self.weight.shape is not None
        return int(self.weight.shape[self.inward])  # type: ignore[arg-type]

    @property
    def groups(self) -> int:
        """Into how many groups a convolution divides its input channels; 1 elsewhere."""
        given = self.node.attributes.get("group")
        return 1 if given is None else int(given.as_int())


def layers(model: onnx_ir.Model) -> Iterator[Layer]:
    """The products of a graph that have weights, in order."""
    for node in model.graph:
        weight = node.inputs[1] if node.op_type in PRODUCTS and len(node.inputs) > 1 else None
        if weight is None or weight.const_value is None or len(weight.const_value.shape) < 2:
            continue
        turned = node.attributes.get("transB")
        first = node.op_type == "Conv" or (turned is not None and turned.as_int() == 1)
        yield Layer(node, weight, *((0, 1) if first else (1, 0)))


def attentions(model: onnx_ir.Model) -> Iterator[tuple[onnx_ir.Node, int, str]]:
    """Attention nodes with the index of each of their three factors, and its name in a table."""
    for node in model.graph:
        if node.op_type == "Attention":
            yield from ((node, index, f"{node.name}.{x}") for index, x in enumerate(FACTORS))


def missing(model: onnx_ir.Model, recipe: Recipe, seen: Channels) -> list[str]:
    """Layers whose inputs the recipe quantizes and the table does not know, or not as wide."""
    absent = [
        layer.name
        for layer in layers(model)
        if _fed(layer, recipe)
        # Of all groups, as it was seen, or of one, as assumed ranges are.
        and (
            layer.name not in seen
            or seen[layer.name].size not in (layer.width, layer.width * layer.groups)
        )
    ]
    if recipe.attention:
        absent += [name for _, _, name in attentions(model) if name not in seen]
    return absent


def eligible(model: onnx_ir.Model, recipe: Recipe) -> list[Layer]:
    """The layers whose weights the recipe has in 8 bits: none in a net of convolutions alone where
    those stay high."""
    return [layer for layer in layers(model) if _chosen(layer, recipe)]


def quantized(model: onnx_ir.Model, recipe: Recipe, seen: Channels) -> int:
    """Put the recipe into a graph, which is changed; returns how many products have both factors in
    8 bits.

    Raises:
        EngineError: the recipe quantizes the inputs of layers that `seen` lacks, or nothing.
    """
    assert recipe.kind is not None
    absent = missing(model, recipe, seen)
    if absent:
        raise EngineError(
            f"the table of scales lacks {len(absent)} layers, {absent[0]} first; it is of another "
            "model: make it with python -m export.quantize --calibrate"
        )
    chosen = eligible(model, recipe)
    if not chosen:
        raise EngineError(f"the recipe quantizes none of the layers of {model.graph.name}")
    # Layers of one input share its pair: queries, keys and values do.
    together: dict[onnx_ir.Value, list[Layer]] = {}
    for layer in chosen:
        source = layer.node.inputs[0]
        assert source is not None
        together.setdefault(source, []).append(layer)
    for source, group in together.items():
        fed = [layer for layer in group if recipe.needs_scale(layer.name)]
        # Channels of several groups share weights' columns, so none can be divided alone.
        smooth = recipe.smooth is not None and all(layer.groups == 1 for layer in fed)
        divisor = _divisor(fed, seen, recipe) if smooth and fed else None
        if fed:
            given = source if divisor is None else _divided(fed[0], source, divisor)
            by = 1 if divisor is None else divisor
            largest = max(float((seen[layer.name] / by).max()) for layer in fed)
            made = pair(fed[0].place, given, largest, recipe.kind)
            for layer in fed:
                layer.node.replace_input_with(0, made)
        for layer in group:
            weight = _weight(layer, recipe, divisor if layer in fed else None)
            layer.node.replace_input_with(1, weight)
    if recipe.attention:
        for node, index, name in attentions(model):
            factor = node.inputs[index]
            assert factor is not None
            made = pair(Place(node, name), factor, float(seen[name].max()), recipe.kind)
            node.replace_input_with(index, made)
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model)
    return sum(recipe.needs_scale(layer.name) for layer in chosen)


def _chosen(layer: Layer, recipe: Recipe) -> bool:
    """Whether a layer's weights are in 8 bits."""
    able = recipe.convolutions or layer.node.op_type != "Conv"
    return able and recipe.quantizes(layer.name)


def _fed(layer: Layer, recipe: Recipe) -> bool:
    """Whether a layer's inputs are in 8 bits as well."""
    return _chosen(layer, recipe) and recipe.needs_scale(layer.name)


def _divisor(group: list[Layer], seen: Channels, recipe: Recipe) -> NDArray[np.float32]:
    """SmoothQuant: what each input channel is divided by, and its weights are multiplied with.

    Source: Xiao et al., SmoothQuant (2023), equation 4, over all layers that share the input.
    """
    assert recipe.smooth is not None
    inputs = np.max([seen[layer.name] for layer in group], axis=0)
    weights = np.max([_inward(layer) for layer in group], axis=0)
    tiny = np.float32(1e-5)
    ratio = np.maximum(inputs, tiny) ** recipe.smooth
    found = ratio / np.maximum(weights, tiny) ** (1 - recipe.smooth)
    return np.asarray(found, np.float32).clip(tiny)


def _inward(layer: Layer) -> NDArray[np.float32]:
    """The largest magnitude of the weights of each input channel."""
    numbers = _numbers(layer)
    others = tuple(axis for axis in range(numbers.ndim) if axis != layer.inward)
    return _largest(numbers, others)


def _largest(numbers: NDArray[np.float32], axes: tuple[int, ...]) -> NDArray[np.float32]:
    """The largest magnitude over some axes; without a second array of magnitudes."""
    return np.asarray(np.maximum(numbers.max(axis=axes), -numbers.min(axis=axes)))


def _numbers(layer: Layer) -> NDArray[np.float32]:
    assert layer.weight.const_value is not None
    # A copy of its own, for it is scaled in place.
    return converted(layer.weight.const_value.numpy(), onnx_ir.DataType.FLOAT).copy()


def _divided(layer: Layer, source: onnx_ir.Value, divisor: NDArray[np.float32]) -> onnx_ir.Value:
    """The input of a group, every channel divided."""
    factor = constant(layer.place, f"{layer.name}.smooth", 1 / divisor, _type(source))
    return node_before(
        layer.place, "Mul", [source, factor], _type(source), source.shape, "smoothed"
    )


def pair(place: Place, source: onnx_ir.Value, largest: float, kind: str) -> onnx_ir.Value:
    """A value through 8 bits and back."""
    rest = _type(source)
    scale = _scale(np.array(largest, np.float32), kind, rest)
    at = constant(place, f"{place.stem}.input_scale", scale, rest)
    zero = constant(place, f"{place.stem}.input_zero", np.zeros(()), _TYPES[kind])
    down = node_before(
        place, "QuantizeLinear", [source, at, zero], _TYPES[kind], source.shape, "in8"
    )
    return node_before(place, "DequantizeLinear", [down, at, zero], rest, source.shape, "input")


def _weight(layer: Layer, recipe: Recipe, factor: NDArray[np.float32] | None) -> onnx_ir.Value:
    """The weights of a layer in 8 bits, and their way back."""
    assert recipe.kind is not None
    assert layer.weight.const_value is not None
    kind, shape = _TYPES[recipe.kind], layer.weight.const_value.shape
    rest = layer.weight.const_value.dtype
    rank = len(shape)
    others = tuple(axis for axis in range(rank) if not recipe.per_channel or axis != layer.axis)
    # Scales come out of the same reading as the numbers, whichever of the two is asked for first.
    kept: list[NDArray[np.float32]] = []

    def numbers() -> NDArray[Any]:
        full = _numbers(layer)
        if factor is not None:
            full *= factor.reshape([-1 if axis == layer.inward else 1 for axis in range(rank)])
        scale = _scale(np.expand_dims(_largest(full, others), others), str(recipe.kind), rest)
        kept[:] = [scale.reshape(-1) if recipe.per_channel else scale.reshape(())]
        full /= scale
        most = LARGEST[str(recipe.kind)]
        np.clip(full, -most, most, out=full)
        if kind == onnx_ir.DataType.INT8:
            np.rint(full, out=full)
        return converted(full, kind)

    def scales() -> NDArray[Any]:
        if not kept:
            numbers()
        return kept[0].astype(rest.numpy())

    stem = str(layer.weight.name)
    counts = (int(shape[layer.axis]),) if recipe.per_channel else ()  # type: ignore[arg-type]
    place = layer.place
    small = _initializer(place, lazy(f"{stem}_in8", kind, shape, numbers))
    scale = _initializer(place, lazy(f"{stem}_scale", rest, counts, scales))
    zero = constant(place, f"{stem}_zero", np.zeros(counts), kind)
    return node_before(
        place, "DequantizeLinear", [small, scale, zero], rest, shape, "weight", axis=layer.axis
    )


def _scale(largest: NDArray[np.float32], kind: str, rest: onnx_ir.DataType) -> NDArray[np.float32]:
    """The step of a type whose largest number stands for `largest`: a number of the type `rest`,
    which is what the way back multiplies by, and never nought, which nothing can be divided by."""
    step = np.maximum(largest / LARGEST[kind], _LEAST_STEP)
    return converted(converted(np.asarray(step, np.float32), rest), onnx_ir.DataType.FLOAT)


def _type(value: onnx_ir.Value) -> onnx_ir.DataType:
    return value.dtype or onnx_ir.DataType.FLOAT


def constant(
    place: Place, name: str, numbers: NDArray[Any], kind: onnx_ir.DataType
) -> onnx_ir.Value:
    return _initializer(place, onnx_ir.Tensor(numbers.astype(kind.numpy()), dtype=kind, name=name))


def _initializer(place: Place, tensor: onnx_ir.TensorProtocol) -> onnx_ir.Value:
    value = onnx_ir.Value(
        name=tensor.name,
        shape=onnx_ir.Shape(list(tensor.shape)),  # type: ignore[arg-type]
        type=onnx_ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph = place.node.graph
    assert isinstance(graph, onnx_ir.Graph)
    graph.register_initializer(value)
    return value


def node_before(
    place: Place,
    kind: str,
    inputs: list[onnx_ir.Value],
    dtype: onnx_ir.DataType,
    shape: Any,
    what: str,
    **attributes: Any,
) -> onnx_ir.Value:
    """A new node; its only output."""
    node = onnx_ir.node(kind, inputs, attributes, name=f"{place.stem}.{what}.{kind}")
    node.outputs[0].name = f"{place.stem}.{what}"
    node.outputs[0].dtype = dtype
    node.outputs[0].shape = onnx_ir.Shape(shape) if shape is not None else None
    graph = place.node.graph
    assert graph is not None
    graph.insert_before(place.node, node)
    return node.outputs[0]
