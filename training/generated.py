"""What generated pictures are made of, for the provenance of weights that learn them.

    >>> ingredients(samples)
    ({'source': 'DermaFlux, bundle flux', 'kind': 'data', 'licence': 'CC0-1.0', ...},
     {'name': 'FLUX.1-schnell', 'kind': 'weights', 'through': 'DermaFlux, bundle flux', ...})

The pictures come first, with the source and the licence that their lines state; then what their
generator was made of, where the `manifest.json` of their dataset tells (`serving.batch` writes it).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from dermaflux import dataset
from training.data import Sample
from training.mixing import SYNTHETIC

log = logging.getLogger(__name__)

MANIFEST: Final = "manifest.json"
_KEPT: Final = ("name", "kind", "licence", "attribution", "sha256")


def ingredients(samples: Iterable[Sample]) -> tuple[dict[str, str], ...]:
    """Entries for `provenance.json`, one per source of generated pictures and one per ingredient of
    its generator; none of real pictures."""
    pairs: dict[tuple[str, str], tuple[Sample, set[Path]]] = {}
    for sample in samples:
        if sample.confirmed == SYNTHETIC:
            pair = (sample.source, sample.licence)
            pairs.setdefault(pair, (sample, set()))[1].add(sample.file.parent)
    found: list[dict[str, str]] = []
    for (source, _), (sample, folders) in sorted(pairs.items()):
        name = f"{source or 'unknown source'}, synthetic pictures"
        found.append({"source": source, "name": name, "kind": "data", "licence": sample.licence,
                      "attribution": sample.attribution or source})  # fmt: skip
        manifests = {_manifest(folder) for folder in folders}
        found += [
            {**{key: str(one[key]) for key in _KEPT if one.get(key)}, "through": source}
            for file in sorted(filter(None, manifests))
            for one in _listed(file)
        ]
    return tuple(one for place, one in enumerate(found) if one not in found[:place])


def _manifest(folder: Path) -> Path | None:
    """The manifest of the dataset that a picture's folder belongs to, if it has one."""
    for place in (folder, *folder.parents):
        if (place / dataset.METADATA).is_file():
            return place / MANIFEST if (place / MANIFEST).is_file() else None
    return None


def _listed(file: Path) -> Iterator[Mapping[str, Any]]:
    """The generator's ingredients; its classifier chooses among pictures, and is in none."""
    try:
        listed = json.loads(file.read_text(encoding="utf-8")).get("ingredients", [])
        entries = [one for one in listed if isinstance(one, dict) and one.get("name")]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        log.warning("%s cannot be read (%s): what made these pictures is not told", file, error)
        return
    yield from (one for one in entries if one.get("used_for") != "classifier")
