"""Keep every test picture apart from whatever was learnt: by the classifiers, and by generators.

A test picture that a generator or its captions saw comes back in what it draws, so the gain that
is measured may be of the test itself. Such pictures make the experiment refuse, or are left out of
the test by name; nothing is left out silently. A generated picture that is one of a test is not
learnt instead: the test stays whole.

    >>> sets, dropped = pools_apart(sets, leave_out=True)
    >>> held = guard(sets, config, leave_out=True)
    >>> held.left_out["test"][0]
    Left(file='isic2017/images/ISIC_0000007.jpg', by='the training ...', seen=..., why=...)
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np

from dermaflux.errors import DatasetError
from dermaflux.thumbnails import Index
from training import data, leaks
from training.data import Sample
from training.experiment.config import Config, Generator
from training.experiment.sets import Sets

log = logging.getLogger(__name__)

_LISTED: Final = 20


@dataclass(frozen=True)
class Left:
    """A picture that is left out, who saw it or where it stands, as what, and why they are one."""

    file: str
    by: str
    seen: str
    why: str


@dataclass(frozen=True)
class Guarded:
    """`left_out` are the test pictures that were seen, by test; `saw` what each generator saw;
    `val_copies` how many validation pictures have a copy among the training ones; `dropped` the
    generated pictures that are one of a test, by generator.
    """

    left_out: dict[str, list[Left]]
    saw: dict[str, dict[str, Any]]
    val_copies: int = 0
    dropped: dict[str, list[Left]] = field(default_factory=dict)

    def kept(self, sets: Sets) -> dict[str, list[Sample]]:
        """The tests without them."""
        out = {name: {one.file for one in left} for name, left in self.left_out.items()}
        return {
            name: [s for s in samples if sets.names[s.file] not in out[name]]
            for name, samples in sets.tests.items()
        }


def guard(sets: Sets, config: Config, leave_out: bool, threads: int = 2) -> Guarded:
    """What has to be left out of the tests, when it may be.

    Raises:
        DatasetError: a test picture was seen and `leave_out` is not said (all are listed); a
            picture cannot be read; all of a test is in another; or a generator that claims to have
            seen a real subset alone saw other pictures.
    """
    train, val = leaks.index(sets.train, threads), leaks.index(sets.val, threads)
    learnt = {
        f"training and validation of {Path(config.real).resolve().name}": joined([train, val])
    }
    for name, model in config.recipes().items():
        if model.saw:
            learnt[f"the weights that {name} begins with"] = _seen(model.saw, threads)
    indices = {name: _seen(one.seen, threads) for name, one in config.generators.items()}
    learnt |= {f"generator {name} or its captions": found for name, found in indices.items()}
    left: dict[str, list[Left]] = {}
    tests: dict[str, Index] = {}
    for name, samples in sets.tests.items():
        test = leaks.index(samples, threads)
        for other, before in tests.items():
            if len(leaks.find(test, before, threads)) == len(test):
                raise DatasetError(
                    f"every picture of the test {name!r} is one of the test {other!r}: they are no "
                    "two tests; leave that external dataset out"
                )
        tests[name] = test
        files = {str(sample.file): sets.names[sample.file] for sample in samples}
        left[name] = [
            Left(files[leak.test], by, leak.seen, leaks.reason(leak))
            for by, seen in learnt.items()
            for leak in leaks.find(test, seen, threads)
        ]
    if not leave_out:
        _refuse(left, sets)
    for name, samples in sets.tests.items():
        left[name] += _kin(left[name], samples, sets)
        if len({one.file for one in left[name]}) == len(samples):
            raise DatasetError(f"every picture of {name} was seen by {left[name][0].by}")
    saw = {
        name: _facts(name, config.generators[name], index, sets, threads)
        for name, index in indices.items()
    }
    return Guarded(left, saw, len(leaks.find(val, train, threads)))


def _kin(left: Sequence[Left], samples: Sequence[Sample], sets: Sets) -> list[Left]:
    """The test's other pictures of the lesions and patients that were seen."""
    firsts = {one.file: one for one in reversed(left)}
    more: dict[str, Left] = {}
    for sample in samples:
        one = firsts.get(sets.names[sample.file])
        if one is None:
            continue
        for file in leaks.kin(samples, {str(sample.file)}):
            name = sets.names[Path(file)]
            if name not in firsts:
                more[name] = Left(name, one.by, one.seen, f"group {sample.group} of {one.file}")
    return list(more.values())


def pools_apart(
    sets: Sets, leave_out: bool, threads: int = 2
) -> tuple[Sets, dict[str, list[Left]]]:
    """The sets without generated pictures that are one of a test, and those, by generator.

    Raises:
        DatasetError: there are some and `leave_out` is not said, all of a generator's are, or a
            picture cannot be read.
    """
    if not sets.pools:
        return sets, {}
    tests = {name: leaks.index(samples, threads) for name, samples in sets.tests.items()}
    pools: dict[str, list[Sample]] = {}
    dropped: dict[str, list[Left]] = {}
    for generator, pool in sets.pools.items():
        made = leaks.index(pool, threads)
        found = {
            leak.test: Left(
                sets.names[Path(leak.test)], f"the test {name!r}",
                sets.names[Path(leak.seen)], leaks.reason(leak),
            )
            for name, test in tests.items()
            for leak in leaks.find(made, test, threads)
        }  # fmt: skip
        pools[generator] = [one for one in pool if str(one.file) not in found]
        dropped[generator] = list(found.values())
        if found and not leave_out:
            raise DatasetError(
                f"{len(found)} of {len(pool)} pictures of generator {generator} stand in a test:\n"
                + _listed([f"  {v.file} = {v.seen} ({v.why}; {v.by})" for v in found.values()])
                + "\nlearn without them: --leave-out; or draw others in their place"
            )
        if not pools[generator]:
            raise DatasetError(f"every picture of generator {generator} stands in a test")
    return replace(sets, pools=pools), dropped


def _listed(lines: Sequence[str]) -> str:
    more = [f"  and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return "\n".join([*lines[:_LISTED], *more])


def _refuse(left: Mapping[str, Sequence[Left]], sets: Sets) -> None:
    for name, found in left.items():
        if not found:
            continue
        lines = [f"  {one.file} = {one.seen} ({one.why}; {one.by})" for one in found]
        count = len({one.file for one in found})
        raise DatasetError(
            f"{count} of {len(sets.tests[name])} pictures of the test {name!r} were seen in "
            "training:\n" + _listed(lines) + "\ntest without them: --leave-out; or make the "
            "splits anew: python -m training.data split"
        )


def _seen(paths: Sequence[Path], threads: int) -> Index:
    """All that a generator, or weights, saw, as one index."""
    return joined([leaks.seen(path, ("train",), threads) for path in paths])


def joined(indices: Sequence[Index]) -> Index:
    """Several indices as one."""
    if len(indices) == 1:
        return indices[0]
    starts = np.cumsum([0, *(len(one) for one in indices)])
    return Index(
        np.concatenate([one.thumbs for one in indices]),
        np.concatenate([one.owner + s for one, s in zip(indices, starts[:-1], strict=True)]),
        tuple(name for one in indices for name in one.names),
        tuple(group for one in indices for group in one.groups),
    )


def _facts(
    name: str, generator: Generator, seen: Index, sets: Sets, threads: int
) -> dict[str, Any]:
    """What a generator saw, in numbers and names.

    Raises:
        DatasetError: it claims a real subset, and saw more.
    """
    sources = {
        pair
        for path in generator.seen
        if path.is_dir()
        for pair in data.licences([s for s in data.read(path) if s.split == "train"])
    }
    facts: dict[str, Any] = {
        "saw": [str(path) for path in generator.seen],
        "digest": sha256(seen.thumbs.tobytes()).hexdigest()[:16],
        "pictures": len(seen),
        "labelled": len(sets.uppers[name]),
        "unknown": sets.unknown[name],
        "sources": [list(pair) for pair in sorted(sources)],
        "made": len(sets.pools[name]),
        "in_subset": {},
    }
    for size in generator.sizes:
        inside = leaks.find(seen, leaks.index(sets.subset(size), threads), threads)
        facts["in_subset"][str(size)] = len(inside)
        if generator.subset and len(inside) < len(seen):
            known = {leak.test for leak in inside}
            first = next(one for one in seen.names if one not in known)
            raise DatasetError(
                f"generator {name} claims to have seen the real subset of {size} alone, but "
                f"{len(seen) - len(inside)} of the {len(seen)} pictures it saw are not in it; the "
                f"first: {first}. Train it on what `--subset {size}` writes, or leave `subset` out"
            )
    return facts | _manifest(Path(generator.data))


def _manifest(folder: Path) -> dict[str, Any]:
    """What the generated dataset says of its making; nothing where it has no manifest."""
    file = folder / "manifest.json"
    if not file.is_file():
        return {}
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        return {
            name: manifest[name]
            for name in ("bundle", "ingredients", "job", "kept", "rejected", "copies")
            if name in manifest
        }
    except (ValueError, OSError) as error:
        log.warning("%s cannot be read (%s); the report says nothing of it", file, error)
        return {}
