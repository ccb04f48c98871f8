"""How large the free axes of a part's tensors are for images of a size.

>>> shape_of(tensor, sizes(8, batch=1, height=1024, width=1024))    # (1, 4096, 64)
"""

from __future__ import annotations

from collections.abc import Mapping

from dermaflux import flow
from dermaflux.bundle import Tensor
from dermaflux.errors import EngineError


def sizes(scale: int, batch: int, height: int, width: int) -> dict[str, int]:
    """Axis name of `bundle.json` -> its length; height and width are of the image, in pixels."""
    _, h, w = flow.latent_shape(height, width, 1, scale)
    return {
        "batch": batch,
        "image_tokens": h * w // 4,
        "latent_height": h,
        "latent_width": w,
        "height": h * scale,
        "width": w * scale,
    }


def shape_of(tensor: Tensor, free: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a tensor whose free axes have these lengths.

    Raises:
        EngineError: an axis that no size says anything of.
    """
    for axis in tensor.shape:
        if isinstance(axis, str) and axis not in free:
            raise EngineError(
                f"{tensor.name} has an axis {axis!r} that is none of {', '.join(free)}; "
                "export the bundle again"
            )
    return tuple(free[axis] if isinstance(axis, str) else axis for axis in tensor.shape)
