"""The decoder of pictures as OpenVINO's CPU runs it fastest: its graph said another way.

Convolutions keep all channels of a pixel side by side. Two things of a decoder do not, and what
they cost has nothing to do with their arithmetic:

* A group norm reshapes its groups, which OpenVINO can only do with every channel on its own: all
  values are moved before it, and back after it. Means over pixels can be taken in place, and the
  means of a group's channels are a tiny convolution of what is left (`norms`).
* A picture is doubled by repeating its pixels, and a 3 x 3 convolution then multiplies every copy
  anew. The two are one transposed convolution with 4 of 9 products (`upsamplings`).

Both give the same numbers up to rounding. A model of one size also has better kernels than one of
any, so the usual size has a model of its own, one picture at a time: what a picture looks like then
cannot depend on its batch, and takes no more memory in one. Other sizes share another model, made
when the first of them is asked for.

    >>> model = core().read_model("bundles/mini/vae_decoder/model.onnx")
    >>> rewrite(model)
    25
    >>> decoder = Decoder(make, {"latent_sample": (1, 16, 16, 16)})
    >>> decoder.run({"latent_sample": latents})["sample"].shape
    (8, 3, 128, 128)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from dermaflux.engines import Array, Arrays, Engine
from dermaflux.engines.ov_nodes import changed
from dermaflux.engines.ov_silu import onesided

Shapes = Mapping[str, tuple[int, ...]]

_PIXELS: Final = (2, 3)
"""Axes of height and width."""
_DOUBLED: Final = (1.0, 1.0, 2.0, 2.0)
_ONE: Final = (1, 1)


def rewrite(model: Any) -> int:
    """`norms`, `upsamplings`, and what is in 8 bits in finer steps (`dermaflux.engines.ov_silu`);
    how many places were changed."""
    return norms(model) + upsamplings(model) + onesided(model)


def norms(model: Any) -> int:
    """Group norms of pictures (float32, constant scale and bias) without reshaping; how many were.

    With x' the mean over pixels and groups: y = (x - x') / sqrt(((x - x')^2)' + epsilon) * scale +
    bias (Wu and He, arXiv 1803.08494), as x times a factor plus a term per channel.
    """
    return changed(model, "GroupNormalization", _norm)


def upsamplings(model: Any) -> int:
    """3 x 3 convolutions of pictures that were doubled, as transposed convolutions of those that
    were not; how many were.

    Row o of the doubled picture is row o // 2, so the kernel's three rows fall on two of the
    picture: which, depends on whether o is even. The two cases are the rows of a kernel of 4 with
    stride 2, and columns are alike.
    """
    return changed(model, "Convolution", _upsampling)


class Compiled(Engine, Protocol):
    """An engine that shows what it compiled."""

    def compiled(self) -> tuple[Any, ...]: ...


class Decoder:
    """An engine that takes `usual` by a model of that shape, others by one of any shape.

    `make` gives an engine for fixed shapes, of one picture, or for any if it is given None.
    """

    def __init__(self, make: Callable[[Shapes | None], Compiled], usual: Shapes) -> None:
        self._make = make
        self._shapes = {name: tuple(shape) for name, shape in usual.items()}
        self._usual = make(self._shapes)
        self._other: Compiled | None = None
        self._making = threading.Lock()
        self.name = self._usual.name
        self.precision = self._usual.precision

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """See `Engine.run`; pictures one after the other."""
        known = inputs.keys() == self._shapes.keys() and all(
            value.shape[1:] == self._shapes[name][1:] for name, value in inputs.items()
        )
        engine = self._usual if known else self._any()
        count = min((len(value) for value in inputs.values()), default=0)
        if count < 2:
            return engine.run(inputs)
        rows = [
            engine.run({name: value[row : row + 1] for name, value in inputs.items()})
            for row in range(count)
        ]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def compiled(self) -> tuple[Any, ...]:
        """What is compiled now; the usual size first."""
        made = [engine for engine in (self._usual, self._other) if engine is not None]
        return tuple(model for engine in made for model in engine.compiled())

    def bind(
        self, constant: Arrays, timesteps: Array | None = None
    ) -> Callable[[Arrays], dict[str, Array]]:
        """See `Engine.bind`."""
        return lambda varying: self.run({**constant, **varying})

    def _any(self) -> Compiled:
        with self._making:
            if self._other is None:
                self._other = self._make(None)
            return self._other


def _norm(node: Any) -> bool:
    from openvino import opset13

    scale, bias = _numbers(node.input_value(1)), _numbers(node.input_value(2))
    value, flat = node.input_value(0), None
    if len(value.get_partial_shape()) == 3 and value.get_node().get_type_name() == "Reshape":
        # Attention takes the pixels of a picture in a row.
        flat = value.get_node()
        value = flat.input_value(0)
    if scale is None or bias is None or not _pictures(value, len(scale)):
        return False
    if flat is not None and flat.output(0).get_partial_shape()[1] != len(scale):
        return False
    groups = node.get_attributes()["num_groups"]
    share = len(scale) // groups
    weights = opset13.constant(np.full((groups, share, share, 1, 1), 1 / share, np.float32))

    def mean(of: Any) -> Any:
        pixels = opset13.reduce_mean(of, np.array(_PIXELS), keep_dims=True)
        return opset13.group_convolution(pixels, weights, _ONE, (0, 0), (0, 0), _ONE)

    centre = mean(value)
    off = opset13.subtract(value, centre)
    spread = opset13.add(
        mean(opset13.multiply(off, off)), np.float32(node.get_attributes()["epsilon"])
    )
    factor = opset13.multiply(opset13.power(spread, np.float32(-0.5)), _column(scale))
    term = opset13.subtract(_column(bias), opset13.multiply(centre, factor))
    made = opset13.add(opset13.multiply(value, factor), term)
    if flat is not None:
        made = opset13.reshape(made, flat.input_value(1), flat.get_attributes()["special_zero"])
    made.set_friendly_name(node.get_friendly_name())
    node.output(0).replace(made.output(0))
    return True


def _upsampling(node: Any) -> bool:
    from openvino import opset13

    repeat = node.input_value(0).get_node()
    if not _repeats(repeat):
        return False
    weights = _numbers(node.input_value(1))
    if weights is None or weights.shape[2:] != (3, 3):
        return False
    has = node.get_attributes()
    if has["auto_pad"] != "explicit" or not all(
        list(has[name]) == [1, 1] for name in ("strides", "dilations", "pads_begin", "pads_end")
    ):
        return False
    value = repeat.input_value(0)
    if not _pictures(value, weights.shape[1]):
        return False
    # As a node: of numbers OpenVINO's Python would make a list first.
    kernel = opset13.constant(doubling(weights))
    made = opset13.convolution_backprop_data(
        value, kernel, (2, 2), None, _ONE, _ONE, _ONE, "explicit"
    )
    made.set_friendly_name(node.get_friendly_name())
    node.output(0).replace(made.output(0))
    return True


def doubling(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Weights [out, in, 3, 3] for a picture of repeated pixels -> those [in, out, 4, 4] of a
    transposed convolution, stride 2 and padding 1, for the picture itself."""
    # Row t of 4 takes row i of the picture to row 2 i + t - 1 of the doubled one. There row k of
    # the kernel lies on row 2 i + t + k - 2, which is row i again where t + k is 2 or 3.
    for axis in (2, 3):
        first, second, third = np.split(weights, 3, axis)
        weights = np.concatenate((third, second + third, first + second, first), axis)
    return np.ascontiguousarray(weights.swapaxes(0, 1))


def _repeats(node: Any) -> bool:
    """Whether a node doubles height and width by repeating pixels, for one reader."""
    if node.get_type_name() != "Interpolate" or len(node.output(0).get_target_inputs()) != 1:
        return False
    has = node.get_attributes()
    scales = _numbers(node.input_value(1))
    return (
        node.get_input_size() == 2  # Without axes, all of them are meant.
        and has["mode"] == "nearest"
        and has["shape_calculation_mode"] == "scales"
        and has["coordinate_transformation_mode"] == "asymmetric"
        and has["nearest_mode"] == "floor"
        and not any(has["pads_begin"])
        and not any(has["pads_end"])
        and scales is not None
        and tuple(scales) == _DOUBLED
    )


def _pictures(value: Any, channels: int) -> bool:
    """Whether a value is float32 [B, channels, height, width]."""
    shape = value.get_partial_shape()
    return bool(
        value.get_element_type().to_dtype() == np.float32
        and shape.rank.is_static
        and len(shape) == 4
        and shape[1] == channels
    )


def _numbers(value: Any) -> NDArray[np.float32] | None:
    """What a constant in float32 holds."""
    node = value.get_node()
    if node.get_type_name() != "Constant" or value.get_element_type().to_dtype() != np.float32:
        return None
    found: NDArray[np.float32] = node.get_data()
    return found


def _column(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.ascontiguousarray(values[None, :, None, None])
