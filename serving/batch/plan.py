"""A plan of a data set in YAML -> its pictures: how many of what, counted exactly and mixed.

    total: 4375
    prompt: "{caption}[, Fitzpatrick skin type {skin_type}]"
    groups:
      - share: 0.5                          # or count: 2000, in all groups
        label: malignant
        diagnosis: {melanoma: 0.7, basal cell carcinoma: 0.3}
        colors: {dark brown: 2, dark brown and black: 1}
        size: {small: 1, medium: 2, large: 1, null: 1}
        skin_type: {I-II: 0.5, III-IV: 0.3, V-VI: 0.2}
        age: 30-80
        steps: 20
      - share: 0.5
        label: benign
        like: ../datasets/isic2017          # beside the plan: attributes as its records have them

Weights become whole numbers by largest remainder, each attribute for itself, and a seed shuffles
them against each other (`serving.batch.quotas`, `choices`, `template` say how each is written).
`like` takes a dataset's records evenly, with all their attributes together. Groups are mixed, so
that shards are alike and half a job is half of every group. The same plan and seed are the same
pictures on every machine.

    python -m serving.batch.plan plan.yaml --bundle bundles/mini --out requests.jsonl

writes what would be drawn as requests, to be looked at or changed, with counts on stderr. Run with
the same seed, those requests are the plan's pictures.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from dermaflux import files
from dermaflux.bundle import Bundle
from dermaflux.command import ended, option, parsed
from dermaflux.dataset import writing
from dermaflux.prompt import LABELS, VOCABULARY, caption
from serving.batch import documents, quotas
from serving.batch.groups import ATTRIBUTES, groups
from serving.batch.items import Item, default_name, item_seed
from serving.batch.members import members

log = logging.getLogger(__name__)

MAX_ROWS: Final = 20
"""Of an attribute in the table: ages and sites may be hundreds."""


@dataclass(frozen=True)
class Settings:
    plan: Path = option("the plan, a YAML file")
    bundle: Path = option("folder of the bundle that will draw", Path("bundles/mini"))
    out: Path | None = option("file for the requests; without it there are the counts alone", None)
    seed: int = option("the job's seed, as python -m serving.batch will be given it", 0)


def read(file: Path, bundle: Bundle, run: int) -> list[Item]:
    """The pictures of a plan; `run` is the job's seed, which settles order, pairing and seeds.

    Raises:
        DatasetError: the plan is wrong; with its file, and the line or the key's path.
    """
    planned = groups(file, documents.read(file), bundle)
    for group in planned:
        if group.silent:
            words = "%s: the prompt does not name these, so they are labels that draw nothing: %s"
            log.warning(words, group.where, ", ".join(group.silent))
    drawn = [members(group, bundle, f"{run}/{number}") for number, group in enumerate(planned)]
    items = []
    for index, place in enumerate(quotas.interleaved([g.size for g in planned], f"{run}/mix")):
        lesion, request, more = next(drawn[place])
        name = default_name(index)
        wanted = replace(request, seed=item_seed(run, name))
        items.append(Item(name, index, lesion, wanted, more))
    return items


def lines(items: Iterable[Item]) -> Iterator[str]:
    """Lines of requests that ask for the same pictures, if the job has the same seed.

    All is said, also what a bundle's defaults are today; seeds only where they are fixed.
    """
    for item in items:
        request = item.request
        words = {name: value for name, value in vars(item.lesion).items() if value}
        row: dict[str, Any] = {"id": item.name, "lesion": words}
        if request.prompt != caption(item.lesion):
            row["prompt"] = request.prompt
        if item.fixed:
            row["seed"] = request.seed
        row |= {"steps": request.steps, "guidance": request.guidance}
        row |= {"width": request.width, "height": request.height, **item.more}
        yield json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False)


def table(items: Sequence[Item]) -> str:
    """Counts of every word asked for, by label."""
    rows = [("", *LABELS, "all")]
    rows.append(("pictures", *_by_label(Counter(str(item.lesion.label) for item in items))))
    for name in ATTRIBUTES[1:]:
        counted: Counter[tuple[str, str]] = Counter()
        for item in items:
            value = getattr(item.lesion, name) if name in VOCABULARY else item.more.get(name)
            counted[_shown(name, value), str(item.lesion.label)] += 1
        words = Counter({word: 0 for word, _ in counted})
        for (word, _), count in counted.items():
            words[word] += count
        if set(words) == {"-"}:
            continue
        for word, _ in words.most_common(MAX_ROWS):
            by = Counter({label: counted[word, label] for label in LABELS})
            rows.append((f"{name}: {word}", *_by_label(by)))
        if len(words) > MAX_ROWS:
            rows.append((f"{name}: {len(words) - MAX_ROWS} more", "", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}" + "".join(f"  {row[c]:>{widths[c]}}" for c in (1, 2, 3))
        for row in rows
    )


def _by_label(counted: Counter[str]) -> tuple[str, str, str]:
    return (str(counted[LABELS[0]]), str(counted[LABELS[1]]), str(counted.total()))


def _shown(name: str, value: Any) -> str:
    if value in (None, (), ""):
        return "-"
    if name == "age":
        return f"{int(value) // 10 * 10}-{int(value) // 10 * 10 + 9}"
    return " and ".join(value) if isinstance(value, tuple) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; its exit status."""
    about = "Show how many of what a plan asks for, and write it as requests."
    settings = parsed(Settings, "python -m serving.batch.plan", about, arguments)
    return ended(lambda: run(settings))


def run(settings: Settings) -> None:
    """The counts on stderr, the requests into a file, and a JSON object on stdout."""
    bundle = Bundle.open(settings.bundle)
    items = read(settings.plan, bundle, settings.seed)
    print(table(items), file=sys.stderr)
    if settings.out is not None:
        with writing(settings.out), files.replacing(settings.out) as stream:
            stream.writelines(f"{line}\n".encode() for line in lines(items))
    labels = Counter(str(item.lesion.label) for item in items)
    told = {
        "plan": str(settings.plan),
        "out": None if settings.out is None else str(settings.out),
        "pictures": len(items),
        "labels": {label: labels[label] for label in LABELS},
        "seed": settings.seed,
        "bundle": bundle.id,
    }
    print(json.dumps(told, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
