"""A checkpoint -> a bundle: traced, quantized, compared with eager torch, and only then put there.

    python -m export models/mini --out bundles/mini
    python -m export models/mini --out bundles/mini --precision fp32 --prompts 16

Progress goes to stderr. The last line of stdout is one JSON object: path, id, seconds, parity. The
exit status is 0, 1 where the comparison refused the export, or 2 where it could not be made; in
both cases an earlier bundle at `--out` stays as it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dermaflux.bundle import GENERATOR_PARTS, PARTS, Bundle, write_manifest
from dermaflux.checkpoint import Checkpoint
from dermaflux.errors import BundleError, DermaFluxError
from dermaflux.images import encode_png
from export.parity import ParityError, require
from export.staging import staged

if TYPE_CHECKING:
    from export.verify import Graph

log = logging.getLogger("export")

PRECISIONS: Final = ("fp32", "int8")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True)
class Settings:
    """What to export; kept in the bundle's provenance."""

    checkpoint: Path = field(metadata=_help("folder that FluxPipeline.save_pretrained wrote"))
    out: Path = field(metadata=_help("the bundle's folder; a bundle there is replaced on success"))
    precision: tuple[str, ...] = field(
        default=PRECISIONS, metadata=_help("comma-separated: fp32 (always), int8; default: both")
    )
    parts: tuple[str, ...] = field(
        default=(),
        metadata=_help(f"comma-separated, of {','.join(PARTS)}; default: all in the checkpoint"),
    )
    prompts: int = field(
        default=8, metadata=_help("images compared with eager, and calibrated on; default: 8")
    )
    seed: int = field(default=0, metadata=_help("of prompts, noise and guidance; default: 0"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status. Errors meant for the user end in one sentence."""
    settings = _parse(arguments)
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO)
    started = time.monotonic()
    try:
        bundle = export(settings)
    except ParityError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except DermaFluxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    result = {
        "path": str(bundle.path),
        "id": bundle.id,
        "seconds": round(time.monotonic() - started, 1),
        "parity": asdict(bundle.parity),
    }
    print(json.dumps(result), flush=True)
    return 0


def export(settings: Settings) -> Bundle:
    """Make the bundle, whole or not at all.

    Raises:
        BundleError: the settings contradict each other, the checkpoint is incomplete, or the place
            cannot be written to.
        EngineError: weights do not fit their config, a library is missing, or int8 is not active.
        ParityError: a graph or an image is too far from eager torch.
    """
    parts = _check(settings)
    # Not at the top: torch takes seconds to import, and a misspelt option none.
    from export.source import require_complete

    require_complete(settings.checkpoint, parts)
    checkpoint = Checkpoint.open(settings.checkpoint)
    with staged(settings.out) as folder:
        _fill(folder, settings, checkpoint, parts)
    return Bundle.open(settings.out)


def _fill(folder: Path, settings: Settings, checkpoint: Checkpoint, parts: Sequence[str]) -> None:
    """All of the bundle into its folder: settings, graphs, golden image, manifest."""
    from transformers.utils import logging as transformers_logging

    from export import compare, manifest, quantize, shapes, source, trace, verify
    from export.reference import Reference, requests

    # A bar for every part that takes a tenth of a second to load.
    transformers_logging.disable_progress_bar()
    say = _clock()
    asked = requests(checkpoint, settings.prompts, settings.seed)
    reference = Reference.make(checkpoint, parts, asked)
    say(f"eager torch made {len(asked)} images in {asked[0].steps} steps each")
    source.write_settings(checkpoint, folder, parts)
    graphs: list[Graph] = []
    for part in parts:
        graph = folder / part / verify.FILES["fp32"]
        example = shapes.examples(checkpoint, part, shapes.sizes(checkpoint)[1])
        trace.trace(reference.modules[part], example, graph)
        verify.standard(graph)
        graphs.append(
            verify.part(graph, part, "fp32", [*reference.seen[part], *reference.sized[part]])
        )
        say(f"{part} traced, {graphs[-1].parity.relative:.1e} from eager")
    if "int8" in settings.precision:
        # Other prompts and seeds than those that are compared.
        other = requests(checkpoint, settings.prompts, settings.seed + 1)
        samples = quantize.calibrate(checkpoint, folder, other)
        say(f"the graphs made {len(other)} images to calibrate on")
        for part in (part for part in quantize.PARTS if part in parts):
            graph = folder / part / verify.FILES["int8"]
            products = quantize.quantize(folder / part / verify.FILES["fp32"], graph, samples[part])
            verify.standard(graph)
            graphs.append(verify.part(graph, part, "int8", reference.seen[part]))
            verify.require_active(graphs[-1], products)
            say(f"{part} quantized, {products} products in int8")
    parity, golden, rows = compare.whole(folder, settings.precision, checkpoint, reference)
    say("images compared")
    rows = [row for graph in graphs for row in graph.rows] + rows
    require(rows)
    for row in rows:
        log.info("  %s", row)
    (folder / golden.image).write_bytes(
        encode_png(reference.images[0], {k: str(v) for k, v in golden.request.items()})
    )
    kept = {name: _plain(value) for name, value in asdict(settings).items()}
    write_manifest(
        folder,
        manifest.content(folder, kept, checkpoint, reference.sized, graphs, parity, golden),
    )


def _check(settings: Settings) -> tuple[str, ...]:
    """The parts to export, in the order of `PARTS`; raises a BundleError for wrong settings."""
    for option, names, known in (
        ("--precision", settings.precision, PRECISIONS),
        ("--parts", settings.parts, PARTS),
    ):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise BundleError(f"{option} {unknown[0]!r} is not known; use {', '.join(known)}")
    if "fp32" not in settings.precision:
        raise BundleError(
            f"--precision {','.join(settings.precision)} lacks fp32, which the parts without "
            "another precision run in; use fp32,int8"
        )
    if settings.prompts < 1:
        raise BundleError(f"--prompts {settings.prompts} compares nothing; use 1 or more")
    present = (settings.checkpoint / "classifier").is_dir()
    wanted = settings.parts or tuple(p for p in PARTS if p != "classifier" or present)
    absent = [part for part in GENERATOR_PARTS if part not in wanted]
    if absent:
        raise BundleError(
            f"--parts lacks {', '.join(absent)}, which every bundle has; only "
            f"{' and '.join(p for p in PARTS if p not in GENERATOR_PARTS)} may be left out"
        )
    return tuple(part for part in PARTS if part in wanted)


def _clock() -> Callable[[str], None]:
    """Log what was done, with the seconds since the start and those that it took."""
    started = last = time.monotonic()

    def say(what: str) -> None:
        nonlocal last
        now = time.monotonic()
        log.info("[%5.1f s] %s (%.1f s)", now - started, what, now - last)
        last = now

    return say


def _plain(value: object) -> object:
    """For JSON; of a path its last name, since the folders above it are nobody's business."""
    return value.name if isinstance(value, Path) else value


def _parse(arguments: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(
        prog="python -m export", description="Make a bundle of a Flux checkpoint."
    )
    for option in fields(Settings):
        kind = {"Path": Path, "int": int}.get(str(option.type), _names)
        text = option.metadata["help"]
        if option.name == "checkpoint":
            parser.add_argument(option.name, type=kind, help=text)
        else:
            required = option.default is MISSING
            default = None if required else option.default
            parser.add_argument(
                f"--{option.name}", type=kind, required=required, default=default, help=text
            )
    return Settings(**vars(parser.parse_args(arguments)))


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


if __name__ == "__main__":
    # So that an export that is stopped takes its unfinished folder with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
