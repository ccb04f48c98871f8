"""Generate and classify lesions without a server, and see what a bundle runs on here.

    python -m dermaflux generate --label malignant --diagnosis melanoma --seed 7 --out lesion.png
    python -m dermaflux generate --prompt "dermoscopic image of ..." --count 8 --out generated
    python -m dermaflux classify photographs/ lesion.jpg
    python -m dermaflux doctor bundles/mini --golden

Results are JSON lines on stdout, one per image; progress and errors go to stderr. The exit status
is 0, 1 where some pictures could not be classified or the doctor found a failure, or 2 where
nothing could be done at all.

Before files of a bundle are opened their sha256 is compared with the manifest's: a flipped bit
makes another lesion, and nobody sees that. Only those that will run are read, beside each other,
and they have to be read anyway to be loaded; `--no-verify` leaves it out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

from dermaflux import __version__, files
from dermaflux.bundle import GENERATOR_PARTS, Bundle
from dermaflux.checkpoint import Checkpoint
from dermaflux.classifier import Classifier
from dermaflux.command import ended
from dermaflux.doctor import damaged, examine, files_of
from dermaflux.engines import EAGER, ENGINES, choose
from dermaflux.errors import BundleError, ImageError, RequestError
from dermaflux.flow import MAX_SEED
from dermaflux.images import decode_upload, encode_png
from dermaflux.pipeline import Pipeline, Progress, Request
from dermaflux.prompt import VOCABULARY, Lesion, caption
from dermaflux.tiers import CLASSIFIER_TIERS, TIERS, Tier, classifier_tier, tier

BUNDLE: Final = Path("bundles/mini")
PICTURES: Final = (".jpg", ".jpeg", ".png", ".webp")
LISTS: Final = ("colors", "structures")
RESIDENCY: Final = {"planned": None, "together": False, "in-turns": True}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status. Errors meant for the user end in one sentence."""
    options = _parser().parse_args(arguments)
    return ended(lambda: options.run(options))


def generate(options: argparse.Namespace) -> int:
    """One image into a file, or several into a folder; a JSON line for each."""
    prompt = _prompt(options)
    single = options.out.suffix.lower() == ".png"
    _check_out(options.out, single, options.count)
    pipeline = _pipeline(options)
    if pipeline.plan is not None and pipeline.plan.in_turns:
        turns = ", then ".join(" and ".join(group) for group in pipeline.plan.groups)
        print(f"note: parts take turns in memory: {turns}", file=sys.stderr)
    first = pipeline.request(
        prompt, options.seed, options.steps, options.guidance, options.height, options.width
    )
    if first.seed > MAX_SEED - (options.count - 1):
        raise RequestError("--seed", f"{first.seed} leaves no room for {options.count} seeds")
    tokens, most = pipeline.token_count(prompt), pipeline.model.text_length
    if tokens > most:
        print(f"note: the prompt has {tokens} tokens; {most} are read", file=sys.stderr)
    requests = [replace(first, seed=first.seed + index) for index in range(options.count)]
    # Parts that take turns are loaded once for all images; else images are written as they come.
    waiting = pipeline.plan is not None and pipeline.plan.in_turns
    batch = len(requests) if waiting else pipeline.limits.max_batch
    for start in range(0, len(requests), batch):
        members = requests[start : start + batch]
        for request, pixels in zip(
            members, pipeline.generate(members, on_step=_show_progress), strict=True
        ):
            record = pipeline.record(request)
            file = options.out if single else options.out / _name(request, record)
            file.parent.mkdir(parents=True, exist_ok=True)
            files.write(file, encode_png(pixels, record))
            print(json.dumps({"file": str(file), **record}), flush=True)
    return 0


def _pipeline(options: argparse.Namespace) -> Pipeline:
    """Over a bundle, or, where none is named beside a checkpoint, with the checkpoint's settings.

    Another model's settings would fit by chance alone: its lengths of text, scales and defaults.
    """
    if options.engine == EAGER and options.checkpoint is not None and options.bundle is None:
        if RESIDENCY[options.residency] is not None:
            raise RequestError("--residency", "needs --bundle, whose sizes are planned with")
        return Pipeline.from_checkpoint(
            options.checkpoint,
            precision=options.precision,
            device=options.device or "cpu",
            compile=options.compile,
            threads=options.threads,
            tier=options.tier,
        )
    chosen = None if options.tier is None else tier(options.tier)
    bundle = _bundle(options, GENERATOR_PARTS, chosen)
    if options.checkpoint is not None:
        _check_is_of(bundle, options.checkpoint)
    return Pipeline.open(
        bundle,
        engine=options.engine,
        precision=options.precision,
        tier=options.tier,
        checkpoint=options.checkpoint,
        threads=options.threads,
        device=options.device,
        compile=options.compile,
        in_turns=RESIDENCY[options.residency],
        height=options.height,
        width=options.width,
    )


def _check_is_of(bundle: Bundle, checkpoint: Path) -> None:
    """A checkpoint runs with a bundle's settings only if its model has the same."""
    ours, theirs = Checkpoint.open(checkpoint).model, bundle.model
    differ = [
        f"{name} {getattr(ours, name)} there, {getattr(theirs, name)} here"
        for name in vars(ours)
        if getattr(ours, name) != getattr(theirs, name)
    ]
    if differ:
        raise RequestError(
            "--checkpoint",
            f"{checkpoint} is of another model than the bundle {bundle.path}: {'; '.join(differ)}. "
            "Leave --bundle out, and the checkpoint's own settings are used",
        )


def classify(options: argparse.Namespace) -> int:
    """A JSON line per picture; one that cannot be read is a line with `error`, and others go on."""
    chosen = None if options.tier is None else classifier_tier(options.tier)
    classifier = Classifier.open(
        _bundle(options, ("classifier",), chosen),
        options.engine,
        options.precision,
        tier=options.tier,
        checkpoint=options.checkpoint,
        threads=options.threads,
    )
    failed = False
    for path in _pictures(options.pictures):
        try:
            picture = decode_upload(_content(path))
        except (ImageError, OSError) as error:
            failed = True
            why = str(error) if isinstance(error, ImageError) else error.strerror
            print(json.dumps({"file": str(path), "error": why}), flush=True)
            continue
        (found,) = classifier.classify([picture])
        print(json.dumps({"file": str(path), **asdict(found)}), flush=True)
    return 1 if failed else 0


def doctor(options: argparse.Namespace) -> int:
    """A report on a bundle and this machine; 1 where something failed."""
    _check_is_bundle(options.bundle)
    report = examine(options.bundle, options.engine, options.precision, golden=options.golden)
    print(json.dumps(report.as_json(), default=str) if options.json else report)
    return 0 if report.healthy else 1


def _bundle(options: argparse.Namespace, parts: Sequence[str], tier: Tier | None = None) -> Bundle:
    """The bundle, after comparing the files of it that will run."""
    if options.engine == EAGER and options.checkpoint is None:
        raise RequestError(
            "--checkpoint", "is missing; --engine eager runs a checkpoint, such as models/mini"
        )
    if options.engine != EAGER and options.checkpoint is not None:
        raise RequestError("--checkpoint", "goes with --engine eager only; leave it out")
    folder = options.bundle or BUNDLE
    _check_is_bundle(folder)
    bundle = Bundle.open(folder)
    if options.verify and options.engine != EAGER:
        choices = [
            choose(bundle, part, options.engine, options.precision, tier=tier)
            for part in parts
            if part in bundle.parts
        ]
        for path in damaged(bundle, files_of(bundle, choices)):
            raise BundleError(
                f"{path} is not what was exported: its sha256 differs. Make the bundle again "
                f"with: python -m export CHECKPOINT --out {folder}"
            )
    return bundle


def _check_is_bundle(folder: Path) -> None:
    """Two folders of a model look alike, and only one of them can be run."""
    if (folder / "model_index.json").is_file() and not (folder / "bundle.json").exists():
        out = Path("bundles") / folder.resolve().name
        raise BundleError(
            f"{folder} is a checkpoint, or an export that did not finish, and no bundle: it has no "
            f"bundle.json. Make one with: python -m export {folder} --out {out}, then name {out}"
        )


def _check_out(out: Path, single: bool, count: int) -> None:
    """Before minutes are spent on an image that nothing can be written to."""
    if single and count > 1:
        raise RequestError("--out", f"{out} is one file; name a folder for several images")
    if single and out.is_dir():
        raise RequestError("--out", f"{out} is a folder; name one that does not end in .png")
    if not single and out.exists() and not out.is_dir():
        raise RequestError("--out", f"{out} is a file; name a folder, or one file.png")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dermaflux",
        description="Generate and classify skin-lesion images. Research use only.",
    )
    parser.add_argument("--version", action="version", version=f"dermaflux {__version__}")
    commands = parser.add_subparsers(required=True, metavar="generate|classify|doctor")

    shared = argparse.ArgumentParser(add_help=False)
    forced = argparse.ArgumentParser(add_help=False)
    forced.add_argument("--engine", choices=ENGINES, metavar="ENGINE", help=f"{', '.join(ENGINES)}")
    forced.add_argument(
        "--precision", help="one the bundle has, such as fp32; default: the fastest"
    )
    shared.add_argument(
        "--bundle", type=Path, help=f"bundle's folder; default: {BUNDLE}, or none with a checkpoint"
    )
    shared.add_argument("--checkpoint", type=Path, help="weights for --engine eager")
    shared.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare the sha256 of files that will run; default: yes",
    )
    shared.add_argument("--threads", type=_positive, help="default: all cores that may be used")

    drawing = commands.add_parser("generate", parents=[shared, forced], help="draw lesions")
    drawing.add_argument("--tier", choices=TIERS, help="what may be given up for speed")
    drawing.add_argument("--prompt", help="free text, instead of a described lesion")
    for name, words in VOCABULARY.items():
        if name in LISTS:
            text = f"comma-separated: {', '.join(words)}"
            drawing.add_argument(f"--{name}", metavar="WORDS", help=text)
        else:
            drawing.add_argument(f"--{name}", metavar="WORD", help=f"one of: {', '.join(words)}")
    drawing.add_argument("--seed", type=int, help="default: random")
    drawing.add_argument("--count", type=_positive, default=1, help="images, seeds counting up")
    drawing.add_argument("--steps", type=int, help="default: the bundle's")
    drawing.add_argument("--guidance", type=float, help="default: the bundle's")
    drawing.add_argument("--height", type=int, help="pixels; default: the bundle's")
    drawing.add_argument("--width", type=int, help="pixels; default: the bundle's")
    drawing.add_argument("--device", help="for --engine eager, such as cuda; default: cpu")
    drawing.add_argument("--compile", action="store_true", help="torch.compile, for --engine eager")
    drawing.add_argument(
        "--residency",
        choices=tuple(RESIDENCY),
        default="planned",
        help="parts in memory: as planned and refused if they do not fit, or forced",
    )
    drawing.add_argument(
        "--out", type=Path, required=True, help="folder, or one file.png, which is replaced"
    )
    drawing.set_defaults(run=generate)

    sorting = commands.add_parser("classify", parents=[shared, forced], help="rate photographs")
    sorting.add_argument("--tier", choices=CLASSIFIER_TIERS, help="what may be given up for speed")
    sorting.add_argument("pictures", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    sorting.set_defaults(run=classify)

    looking = commands.add_parser(
        "doctor", parents=[forced], help="examine a bundle and this machine"
    )
    looking.add_argument("bundle", nargs="?", type=Path, default=BUNDLE)
    looking.add_argument("--golden", action="store_true", help="make the golden image and compare")
    looking.add_argument("--json", action="store_true", help="for programs")
    looking.set_defaults(run=doctor)
    return parser


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer above 0")
    return int(text)


def _prompt(options: argparse.Namespace) -> str:
    given = {name: value for name in VOCABULARY if (value := getattr(options, name)) is not None}
    if options.prompt is not None:
        if given:
            raise RequestError("--prompt", f"cannot go with --{next(iter(given))}; use one of both")
        return str(options.prompt)
    for name in LISTS:
        if name in given:
            given[name] = [word.strip() for word in given[name].split(",")]
    return caption(Lesion.from_mapping(given))


def _name(request: Request, record: dict[str, str]) -> str:
    """Seed first, for people; then a hash of all that made it, so that nothing is overwritten."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
    return f"{request.seed}-{digest}.png"


def _pictures(paths: Sequence[Path]) -> Iterator[Path]:
    """The files named, and those in the folders named; a folder without any stands for itself."""
    for path in paths:
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
        yield from found or [path]


def _content(path: Path) -> bytes:
    if path.is_dir():
        raise ImageError(f"the folder has no picture ({', '.join(PICTURES)})")
    return path.read_bytes()


def _show_progress(progress: Progress) -> None:
    if sys.stderr.isatty():
        end = "\n" if progress.step == progress.steps else ""
        print(f"\rstep {progress.step}/{progress.steps}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
