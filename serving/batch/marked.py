"""Pictures of a dataset, signed as the service's are, with a site's own keys.

    >>> marker = opened(Path("/var/lib/dermaflux/marks"), bundle.id, os.environ)
    >>> Store(folder, journal, marker)

Signing leaves every pixel as it was. The watermark is left out whatever the service does: these
pictures are there to be trained on, and a classifier could learn the mark (docs/provenance.md).
Keys stay with who writes the files: on a cluster no actor that draws sees them.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from PIL import Image

from dermaflux.marks import Marker
from serving.batch.maker import Made

VARIABLE: Final = "DERMAFLUX_MARKS"
PREFIX: Final = "dermaflux."
"""Of the texts that `dermaflux.images` puts a record into."""


def opened(folder: Path | None, bundle: str, environment: Mapping[str, str]) -> Marker | None:
    """What signs pictures of the bundle of this id, where a folder of marks is named, if only in
    the environment; it is made if it is not there.

    Raises:
        MarksError, RegistryError: its keys do not do, or it takes no files.
    """
    named = folder or environment.get(VARIABLE, "").strip()
    if not named:
        return None
    marker = Marker.open(Path(named), bundle, watermark=False)
    marker.registry.add()  # of no hash: whether it takes any
    return marker


def signed(marker: Marker, made: Made) -> bytes:
    """The PNG with a manifest that has its own record."""
    with Image.open(io.BytesIO(made.png), formats=("PNG",)) as picture:
        # The texts stand before the pixels, which are not unpacked for them.
        texts = {str(key): str(value) for key, value in picture.info.items()}
    record = {
        key.removeprefix(PREFIX): value for key, value in texts.items() if key.startswith(PREFIX)
    }
    return marker.sign(made.png, record, made.pixels)
