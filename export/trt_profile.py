"""The shapes a TensorRT plan is built for: smallest, timed and largest of every input of a part.

Every free axis of `export.shapes` takes its range from the bundle's own limits, so a plan serves
what the bundle allows. A static profile has one shape, which a CUDA graph needs.

    >>> profile(bundle, "transformer")["hidden_states"]
    Range(min=(1, 16, 64), opt=(1, 64, 64), max=(8, 256, 64))
    >>> profile(bundle, "transformer", Size(1, 256, 256))["hidden_states"].max
    (1, 64, 64)
"""

from __future__ import annotations

from collections.abc import Mapping

from dermaflux import flow
from dermaflux.bundle import Bundle
from dermaflux.engines.trt_plan import DYNAMIC, Range
from dermaflux.errors import BundleError
from export.shapes import Size

Profile = Mapping[str, Range]


def profile(bundle: Bundle, part: str, static: Size | None = None) -> Profile:
    """Input name -> its shapes, for every size the bundle allows, or for `static` alone.

    Raises:
        BundleError: `static` is outside the bundle's limits, or a free axis has no known range.
    """
    limits, defaults = bundle.limits, bundle.defaults
    if static is None:
        sizes = (
            Size(1, limits.min_size, limits.min_size),
            # One image is what is waited for; larger batches run too, on kernels chosen for one.
            Size(1, defaults.height, defaults.width),
            Size(limits.max_batch, limits.max_size, limits.max_size),
        )
    else:
        _check(bundle, static)
        sizes = (static, static, static)
    small, timed, large = (_axes(bundle, size) for size in sizes)
    ranges = {}
    for tensor in bundle.parts[part].inputs:
        for axis in tensor.shape:
            if isinstance(axis, str) and axis not in small:
                raise BundleError(f"{part}: input {tensor.name} has a free axis {axis!r}; known "
                                  f"are {', '.join(small)}")  # fmt: skip
        ranges[tensor.name] = Range(
            *(
                tuple(axis if isinstance(axis, int) else axes[axis] for axis in tensor.shape)
                for axes in (small, timed, large)
            )
        )
    return ranges


def parse_size(text: str) -> Size:
    """`512x512` or `512x512x4` (height, width, batch) -> a size; batch 1 where it is not said."""
    try:
        height, width, *batch = (int(number) for number in text.split("x"))
        if len(batch) > 1 or min(height, width, *batch) < 1:
            raise ValueError
    except ValueError:
        raise BundleError(
            f"--static {text!r} is not a size; write height x width, as 512x512, or with the "
            "batch behind, as 512x512x4"
        ) from None
    return Size(batch[0] if batch else 1, height, width)


def variant(static: Size | None) -> str:
    """The name of a plan's variant."""
    return f"{static.height}x{static.width}x{static.batch}" if static else DYNAMIC


def _axes(bundle: Bundle, size: Size) -> dict[str, int]:
    model = bundle.model
    _, h, w = flow.latent_shape(size.height, size.width, model.latent_channels, model.scale)
    return {
        "batch": size.batch,
        "image_tokens": h * w // 4,
        "latent_height": h,
        "latent_width": w,
        "height": size.height,
        "width": size.width,
    }


def _check(bundle: Bundle, size: Size) -> None:
    limits = bundle.limits
    for side in (size.height, size.width):
        if not limits.min_size <= side <= limits.max_size or side % limits.size_multiple:
            raise BundleError(
                f"--static {size.height}x{size.width}: {bundle.path} takes sides of "
                f"{limits.min_size} to {limits.max_size} in steps of {limits.size_multiple}"
            )
    if size.batch > limits.max_batch:
        raise BundleError(
            f"--static with batch {size.batch}: {bundle.path} takes up to {limits.max_batch}"
        )
