"""Where a process of the service finds the bundle that it serves."""

from __future__ import annotations

from pathlib import Path

from dermaflux.errors import BundleError
from serving.settings import Settings

DEFAULT_BUNDLE = Path("bundles/mini")
HERE = Path(__file__).resolve().parent.parent
"""The repository, or the `src` folder of a Bento."""


def find_bundle(settings: Settings) -> Path:
    """The bundle of the settings, else bundles/mini of the working folder, else that beside us.

    Raises:
        BundleError: the default is nowhere.
    """
    if settings.bundle is not None:
        return settings.bundle
    for folder in (DEFAULT_BUNDLE, HERE / DEFAULT_BUNDLE):
        if folder.is_dir():
            return folder
    raise BundleError(
        f"there is no bundle at {DEFAULT_BUNDLE}. Make it with: "
        f"python -m export models/mini --out {DEFAULT_BUNDLE}, or name one in DERMAFLUX_BUNDLE"
    )
