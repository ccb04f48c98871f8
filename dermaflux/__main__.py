"""Generate and classify lesions without a server.

    python -m dermaflux generate --label malignant --diagnosis melanoma --seed 7 --out lesion.png
    python -m dermaflux generate --prompt "dermoscopic image of ..." --count 8 --out generated
    python -m dermaflux classify photographs/ lesion.jpg

Results are JSON lines on stdout, one per image; progress and errors go to stderr. The exit status
is 0, 1 where some pictures could not be classified, or 2 where nothing could be done at all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from dermaflux import __version__, files
from dermaflux.classifier import Classifier
from dermaflux.engines import EAGER, OPENVINO, ORT
from dermaflux.errors import DermaFluxError, ImageError, RequestError
from dermaflux.flow import MAX_SEED
from dermaflux.images import decode_upload, encode_png
from dermaflux.pipeline import Pipeline, Progress, Request
from dermaflux.prompt import VOCABULARY, Lesion, caption

PICTURES: Final = (".jpg", ".jpeg", ".png", ".webp")
LISTS: Final = ("colors", "structures")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status. Errors meant for the user end in one sentence."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except DermaFluxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return status


def generate(options: argparse.Namespace) -> int:
    """One image into a file, or several into a folder; a JSON line for each."""
    prompt = _prompt(options)
    single = options.out.suffix.lower() == ".png"
    if single and options.count > 1:
        raise RequestError("--out", f"{options.out} is one file; name a folder for several images")
    pipeline = Pipeline.open(
        options.bundle,
        engine=options.engine,
        precision=options.precision,
        checkpoint=options.checkpoint,
        threads=options.threads,
    )
    first = pipeline.request(
        prompt, options.seed, options.steps, options.guidance, options.height, options.width
    )
    if first.seed > MAX_SEED - (options.count - 1):
        raise RequestError("--seed", f"{first.seed} leaves no room for {options.count} seeds")
    tokens, most = pipeline.token_count(prompt), pipeline.model.text_length
    if tokens > most:
        print(f"note: the prompt has {tokens} tokens; {most} are read", file=sys.stderr)
    requests = [replace(first, seed=first.seed + index) for index in range(options.count)]
    batch = pipeline.limits.max_batch
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


def classify(options: argparse.Namespace) -> int:
    """A JSON line per picture; one that cannot be read is a line with `error`, and others go on."""
    classifier = Classifier.open(
        options.bundle,
        options.engine,
        options.precision,
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
        print(json.dumps({"file": str(path), **vars(found)}), flush=True)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dermaflux",
        description="Generate and classify skin-lesion images. Research use only.",
    )
    parser.add_argument("--version", action="version", version=f"dermaflux {__version__}")
    commands = parser.add_subparsers(required=True, metavar="generate|classify")

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--bundle", type=Path, default=Path("bundles/mini"), help="bundle's folder")
    shared.add_argument("--engine", choices=(ORT, OPENVINO, EAGER), help="default: the fastest")
    shared.add_argument("--precision", help="fp32 or int8; default: the fastest")
    shared.add_argument("--checkpoint", type=Path, help="weights for --engine eager")
    shared.add_argument("--threads", type=_positive, help="default: all cores that may be used")

    drawing = commands.add_parser("generate", parents=[shared], help="draw lesions")
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
    drawing.add_argument("--out", type=Path, required=True, help="folder, or one file.png")
    drawing.set_defaults(run=generate)

    sorting = commands.add_parser("classify", parents=[shared], help="rate photographs")
    sorting.add_argument("pictures", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    sorting.set_defaults(run=classify)
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
