"""Make datasets of public collections and look after them: `python -m training.data COMMAND`.

    python -m training.data import isic2019 ISIC_2019 --out datasets/isic2019 --size 512
    python -m training.data merge datasets/isic2019 datasets/ddi --out datasets/all
    python -m training.data split datasets/all --val 0.1 --test 0.2 --seed 0
    python -m training.data check datasets/all
    python -m training.data index datasets/all --out seen.npz
    python -m training.data leaks datasets/other --seen seen.npz

`import` without more lists the collections. The last line of each is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from dermaflux import dataset, duplicates, thumbnails
from dermaflux.command import ended
from dermaflux.errors import DatasetError
from training import audit, data, grouping, importing, joining, leaks
from training.sources.table import COLLECTIONS, named


def _bar(words: str) -> Any:
    from tqdm import tqdm

    return partial(tqdm, desc=words, unit="", leave=False, file=sys.stderr)


def _import(options: argparse.Namespace) -> int:
    plan = importing.Plan(options.size, options.link, options.modality, options.threads)
    labels = importing.labels_of(options.labels)
    collection = named(options.collection)
    bar = _bar("importing")
    summary = importing.run(collection, options.folder, options.out, plan, labels, bar)
    if summary["kept"]:
        print(
            f"{options.out} held a dataset already: its {summary['kept']} records stay as they "
            f"are, {summary['added']} were added"
            + ("; python -m training.data split makes splits with them" * bool(summary["added"])),
            file=sys.stderr,
        )
    print(json.dumps(summary))
    return 0


def _check(options: argparse.Namespace) -> int:
    report, wrong = audit.run(
        options.dataset, not options.no_duplicates, options.threads, _bar("checking")
    )
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    print(json.dumps(report))
    return 1 if wrong else 0


def _split(options: argparse.Namespace) -> int:
    folder = options.dataset
    grouping.check(options.val, options.test)
    records = dataset.read(folder)
    built = grouping.index(folder, records, options.threads, _bar("reading"))
    if built.broken:
        raise DatasetError(
            f"{len(built.broken)} pictures of {folder} cannot be read, such as "
            f"{next(iter(built.broken))}; python -m training.data check {folder}"
        )
    twins = duplicates.twins(built.index, threads=options.threads, shown=_bar("comparing"))
    grouped = grouping.regrouped(records, built.index, twins)
    result = grouping.split(grouped, options.val, options.test, options.seed)
    dataset.write(folder, result)
    summary = {
        "dataset": str(folder),
        "images": len(result),
        "near_duplicates": len(twins),
        "groups_before": len({record.group for record in records}),
        "groups": len({record.group for record in result}),
        "splits": {
            name: dict(Counter(record.label for record in result if record.split == name))
            for name in dataset.SPLITS
        },
    }
    print(json.dumps(summary))
    return 0


def _merge(options: argparse.Namespace) -> int:
    print(json.dumps(joining.run(options.datasets, options.out, _bar("linking"))))
    return 0


def _index(options: argparse.Namespace) -> int:
    _check_target(options.out)
    index = leaks.seen(options.dataset, options.splits, options.threads, _bar("reading"))
    index.save(options.out)
    print(json.dumps({"out": str(options.out), "images": len(index)}))
    return 0


def _check_target(file: Path) -> None:
    """Refuse a file that cannot be written, before pictures are read for hours."""
    if not file.parent.is_dir():
        raise DatasetError(f"--out {file}: there is no folder {file.parent}; make it first")
    if file.is_dir():
        raise DatasetError(f"--out {file} is a folder; give a file in it, such as {file}/seen.npz")
    if not os.access(file.parent, os.W_OK):
        raise DatasetError(f"--out {file}: {file.parent} takes no files; give another folder")


def _leaks(options: argparse.Namespace) -> int:
    samples = [one for one in data.read(options.dataset) if one.split in options.test_splits]
    if not samples:
        raise DatasetError(f"{options.dataset} has no sample in {', '.join(options.test_splits)}")
    test = leaks.index(samples, options.threads, _bar("reading"))
    parts = [leaks.seen(path, options.splits, options.threads) for path in options.seen]
    seen = thumbnails.joined(parts)
    found = leaks.find(test, seen, options.threads, _bar("comparing"))
    for leak in found:
        print(f"{leak.test} = {leak.seen} ({leaks.reason(leak)})", file=sys.stderr)
    print(json.dumps({
        "test": len(test), "seen": len(seen), "leaks": len(found),
        "pairs": [[leak.test, leak.seen, leaks.reason(leak)] for leak in found],
    }))  # fmt: skip
    return 1 if found else 0


def _names(text: str) -> tuple[str, ...]:
    chosen = tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in chosen if name not in dataset.SPLITS]:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r} is no split; use {', '.join(dataset.SPLITS)}"
        )
    return chosen


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; use 0 to under 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.data", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, work: Any, text: str, **more: Any) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(
            name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter, **more
        )
        added.set_defaults(work=work)
        added.add_argument("--threads", type=data.count, default=2)
        return added

    listed = "\n".join(f"  {one.name:12} {one.help}" for one in COLLECTIONS)
    one = command(
        "import", _import, "a publisher's folder -> a dataset",
        epilog=f"collections, and what their folders hold:\n{listed}",
    )  # fmt: skip
    one.add_argument("collection", choices=[each.name for each in COLLECTIONS])
    one.add_argument("folder", type=Path, help="as its publisher packs it")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--size", type=data.count, default=0, help="shrink the shorter side to this")
    one.add_argument("--link", choices=importing.LINKS, default="copy", help="where not shrunk")
    one.add_argument("--modality", default="", help="take only: dermoscopic, clinical, ...")
    one.add_argument("--labels", type=Path, help="another map than training/labels.toml")
    one = command("check", _check, "counts, licences, broken pictures, divided groups, copies")
    one.add_argument("dataset", type=Path)
    one.add_argument("--no-duplicates", action="store_true", help="do not compare pictures")
    one = command("split", _split, "unite copies into groups, make new splits")
    one.add_argument("dataset", type=Path)
    one.add_argument("--val", type=_share, default=0.1)
    one.add_argument("--test", type=_share, default=0.2)
    one.add_argument("--seed", type=int, default=0)
    one = command("merge", _merge, "several datasets -> one")
    one.add_argument("datasets", type=Path, nargs="+")
    one.add_argument("--out", type=Path, required=True)
    one = command("index", _index, "what was seen, to hold tests against")
    one.add_argument("dataset", type=Path)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--splits", type=_names, default=leaks.LEARNT)
    one = command("leaks", _leaks, "refuse test pictures that were seen")
    one.add_argument("dataset", type=Path)
    one.add_argument("--seen", type=Path, nargs="+", required=True, help="datasets or indexes")
    one.add_argument("--splits", type=_names, default=leaks.LEARNT, help="of datasets seen")
    one.add_argument("--test-splits", type=_names, default=("test",))
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return ended(
        lambda: int(options.work(options)), "stopped; the same command goes on where it was"
    )
