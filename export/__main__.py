"""A checkpoint -> a bundle: traced, quantized, compared with eager torch, and only then put there.

    python -m export models/mini --out bundles/mini
    python -m export models/mini --precision fp32,int8,fp8 --photographs ../isic
    python -m export FLUX --precision bf16,fp8 --calibration flux.scales.npz --prompts 0

A model that is too large to run on this machine is exported with `--prompts 0`, which compares
nothing (and says so in the bundle), and with a table of scales that was made where it runs
(`python -m export.quantize --calibrate`). No step holds more of it than its largest tensor.

Progress goes to stderr. The last line of stdout is one JSON object: path, id, seconds, parity. The
exit status is 0, 1 where the comparison refused the export, or 2 where it could not be made; in
both cases an earlier bundle at `--out` stays as it was.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dermaflux.bundle import GENERATOR_PARTS, PARTS, Bundle, Parity, write_manifest
from dermaflux.checkpoint import UNKNOWN_LICENCE, Checkpoint
from dermaflux.command import ended, option, parsed
from dermaflux.errors import BundleError, EngineError
from dermaflux.images import encode_png
from dermaflux.licence import LicenceError
from dermaflux.policy import Policy, judge
from export.heap import MAPPED, unmap_from
from export.parity import require
from export.prompts import require_seed
from export.recipes import ENGINES, FILES, MAY_RUN, PRECISIONS, PRUNED, RECIPES
from export.staging import staged

if TYPE_CHECKING:
    from export.reference import Picture, Reference
    from export.scales import Scales
    from export.shapes import Size
    from export.verify import Graph

log = logging.getLogger("export")

DEFAULT: Final = ("fp32", "int8")
CALIBRATED_ON: Final = 8
"""Images that ranges are measured on: 160 steps of the embedded default."""


@dataclass(frozen=True)
class Settings:
    """What to export; kept in the bundle's provenance."""

    checkpoint: Path = option("folder that FluxPipeline.save_pretrained wrote")
    out: Path = option(
        "the bundle's folder; a bundle there is replaced on success; default: bundles/NAME", Path()
    )
    precision: tuple[str, ...] = option(
        f"comma-separated, of {','.join(PRECISIONS)}; default: {','.join(DEFAULT)}", DEFAULT
    )
    parts: tuple[str, ...] = option(
        f"comma-separated, of {','.join(PARTS)}; default: all in the checkpoint", ()
    )
    engines: tuple[str, ...] = option(
        "comma-separated: engines that the bundle is for; default: all", ENGINES
    )
    calibration: Path | None = option(
        "a table of scales (python -m export.quantize --calibrate), or requests as JSON lines "
        "to make one of; default: calibrate here on the model's own prompts",
        None,
    )
    photographs: Path | None = option(
        "folder with metadata.jsonl or .csv (file_name, label), whose pictures the classifier "
        "is compared on; default: on generated ones",
        None,
    )
    attention: bool = option("int8 and fp8: queries, keys and values in 8 bits too", False)
    merged: float = option(
        f"{PRUNED}: share of the work of a vision transformer's blocks that is left; default: 0.63",
        0.63,
    )
    lpips: Path | None = option(
        "torchvision's AlexNet as safetensors: images are compared by LPIPS as well", None
    )
    prompts: int = option("images compared with eager; 0 compares nothing; default: 64", 64)
    seed: int = option("of prompts, noise and guidance; default: 0", 0)
    policy: str = option(
        "private, research, commercial, or a YAML file: what the licences of all ingredients have "
        "to allow; default: research",
        "research",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status. Errors meant for the user end in one sentence."""
    settings = parsed(
        Settings, "python -m export", "Make a bundle of a Flux checkpoint.", arguments
    )
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO)

    def work() -> None:
        started = time.monotonic()
        unmap_from(MAPPED)
        bundle = export(settings)
        result = {
            "path": str(bundle.path),
            "id": bundle.id,
            "seconds": round(time.monotonic() - started, 1),
            "parity": asdict(bundle.parity),
        }
        print(json.dumps(result), flush=True)

    return ended(work)


def export(settings: Settings) -> Bundle:
    """Make the bundle, whole or not at all.

    Raises:
        BundleError: the settings contradict each other, the checkpoint is incomplete, or the place
            cannot be written to.
        LicenceError: the policy forbids what the checkpoint is made of.
        EngineError: weights do not fit their config, a library is missing, or int8 is not active.
        ParityError: a graph or an image is too far from eager torch.
    """
    settings, parts = _check(settings)
    # Not at the top: torch takes seconds to import, and a misspelt option none.
    from export.source import require_complete

    require_complete(settings.checkpoint, parts)
    checkpoint = Checkpoint.open(settings.checkpoint)
    require_allowed(checkpoint, settings.policy, parts)
    with staged(settings.out) as folder:
        _fill(folder, settings, checkpoint, parts)
    return Bundle.open(settings.out)


def require_allowed(checkpoint: Checkpoint, policy: str, parts: Sequence[str]) -> None:
    """Nothing, where a policy lets these parts of a checkpoint be used.

    Raises:
        LicenceError: by ingredient, with what can be done; or there is no such policy.
    """
    verdict = judge(checkpoint.provenance, Policy.of(policy), classifier="classifier" in parts)
    try:
        verdict.require()
    except LicenceError as error:
        if checkpoint.provenance.get("licence") not in (None, "", UNKNOWN_LICENCE):
            raise
        # A publisher's folder has its licence in words beside it, which nobody here can read.
        raise LicenceError(
            f"{checkpoint.path} does not say under which licence it is, so: {error}. If you know "
            f"it, write {checkpoint.path / 'provenance.json'} with name and licence, such as "
            '{"name": "FLUX.1-schnell", "licence": "Apache-2.0"}'
        ) from None


def _fill(folder: Path, settings: Settings, checkpoint: Checkpoint, parts: Sequence[str]) -> None:
    """All of the bundle into its folder: settings, graphs, golden image, manifest."""
    from transformers.utils import logging as transformers_logging

    from export import compare, manifest, source
    from export.perceptual import Perceptual

    # A bar for every part that takes a tenth of a second to load.
    transformers_logging.disable_progress_bar()
    say = _clock()
    # Before the minutes that all else takes: it may be a file that cannot be used.
    perceptual = Perceptual.open(settings.lpips) if settings.lpips is not None else None
    reference = _reference(settings, checkpoint, parts, say)
    table = _table(settings, checkpoint, parts, say)
    source.write_settings(checkpoint, folder, parts)
    graphs: list[Graph] = []
    for part in parts:
        graphs += _graphs(folder, settings, checkpoint, part, table, reference, say)
    rows = [row for graph in graphs for row in graph.rows]
    parity, golden = Parity({}, {}), None
    if reference is not None:
        parity, golden, more = compare.whole(
            folder, settings.precision, checkpoint, reference, perceptual
        )
        say("images compared")
        rows += more
        require(rows)
        (folder / golden.image).write_bytes(
            encode_png(reference.images[0], {k: str(v) for k, v in golden.request.items()})
        )
    for row in rows:
        log.info("  %s", row)
    _note_sizes(graphs)
    kept = {name: _plain(value) for name, value in asdict(settings).items()}
    kept["policy"] = Path(settings.policy).name
    kept["calibrated_on"] = None if table is None else table.request_set
    write_manifest(
        folder,
        manifest.content(folder, kept, checkpoint, settings.engines, graphs, parity, golden),
    )


def _reference(
    settings: Settings, checkpoint: Checkpoint, parts: Sequence[str], say: Callable[[str], None]
) -> Reference | None:
    """What eager torch makes, unless nothing is to be compared.

    Raises:
        EngineError: the model does not fit into this machine's memory.
    """
    if not settings.prompts:
        log.info("nothing is compared with eager torch, and the bundle says so")
        return None
    from export.calibrate import require_room
    from export.reference import Reference, read_pictures, requests

    pictures: Sequence[Picture] = (
        read_pictures(settings.photographs) if settings.photographs is not None else ()
    )
    try:
        require_room(checkpoint, parts, 4, "comparing")
    except EngineError as error:
        raise EngineError(f"{error}; export without comparing: --prompts 0") from error
    asked = requests(checkpoint, settings.prompts, settings.seed)
    reference = Reference.make(checkpoint, parts, asked, pictures)
    say(f"eager torch made {len(asked)} images in {asked[0].steps} steps each")
    return reference


def _table(
    settings: Settings, checkpoint: Checkpoint, parts: Sequence[str], say: Callable[[str], None]
) -> Scales | None:
    """The table of scales, read or made; none where no precision needs one.

    Raises:
        BundleError: the table is not of this checkpoint.
        EngineError: there is none, and the model is too large to be calibrated here.
    """
    from export.calibrate import ASSUMED, calibrate, needing_scales
    from export.reference import read_requests, requests
    from export.scales import Scales, command

    needing = [part for part in needing_scales(checkpoint) if part in parts]
    if not any(RECIPES[p][part].kind for p in settings.precision for part in RECIPES[p]):
        return None
    given = settings.calibration
    if given is not None and given.suffix != ".jsonl":
        table = Scales.open(given)
        for part in needing:
            table.require(checkpoint.path, part)
        if table.request_set == ASSUMED:
            log.warning(
                "the ranges of %s are assumed, not measured: the bundle is of no use", given
            )
        return table
    if given is not None:
        asked = read_requests(checkpoint, given)
    else:
        # Other prompts and seeds than those that are compared.
        asked = requests(checkpoint, CALIBRATED_ON, settings.seed + 1)
    try:
        table = calibrate(checkpoint, asked)
    except EngineError as error:
        raise EngineError(
            f"{error}. Make a table of scales on a machine that holds the model, and name it with "
            f"--calibration: {command(checkpoint.path)} --device cuda --dtype bf16"
        ) from error
    say(f"calibrated on {len(asked)} images")
    return table


def _graphs(
    folder: Path,
    settings: Settings,
    checkpoint: Checkpoint,
    part: str,
    table: Scales | None,
    reference: Reference | None,
    say: Callable[[str], None],
) -> Iterator[Graph]:
    """A part's files: traced once, then said in every precision that there is a recipe for."""
    from export import attention, pruned, shapes, trace, verify
    from export.lower import lower
    from export.quantized import eligible, quantized

    examples = shapes.examples(checkpoint, part, _size(checkpoint))
    model = trace.trace(checkpoint.path, part, examples)
    say(f"{part} traced")
    asked = [precision for precision in settings.precision if part in RECIPES[precision]]
    merger = pruned.merger_of(checkpoint.path, settings.merged) if PRUNED in asked else None
    if PRUNED in asked and merger is None:
        asked.remove(PRUNED)
    for precision in [one for one in asked if RECIPES[one][part].kind is not None]:
        if not eligible(model, RECIPES[precision][part]):
            log.info("%s has no layer that %s is for, and no file of it", part, precision)
            asked.remove(precision)
    # What has no recipe in any precision that was asked for runs in fp32.
    for precision in asked or ["fp32"]:
        recipe, graph = RECIPES[precision][part], folder / part / FILES[precision]
        if part == "transformer" and recipe.kind is not None:
            recipe = replace(recipe, attention=settings.attention)
        whole = model
        if precision == PRUNED:
            whole = trace.trace(checkpoint.path, part, examples, merger)
        variant = lower(whole.clone(), recipe)
        products = 0
        if recipe.kind is not None:
            assert table is not None
            channels = table.parts.get(part, {})
            if recipe.apart:
                names = attention.split(variant)
                channels = attention.known(names, channels)
                attention.in8(variant, names, recipe.kind, channels)
            products = quantized(variant, recipe, channels)
        trace.write(variant, graph)
        verify.standard(graph)
        if reference is None:
            say(f"{part} written in {precision}")
            yield verify.Graph(graph, part, precision)
            continue
        sized = reference.sized[part] if precision == "fp32" else ()
        seen = reference.seen[part]
        if precision == PRUNED:
            assert merger is not None
            seen = pruned.merged_cases(checkpoint.path, merger, seen)
        found = verify.part(graph, part, precision, [*seen, *sized])
        verify.require_active(found, products)
        assert found.parity is not None
        say(f"{part} in {precision}, {found.parity.relative:.1e} from eager")
        if precision == "fp32":
            # At once: the others are made of this graph, and would fail for reasons of their own.
            require(found.rows)
        yield found


def _size(checkpoint: Checkpoint) -> Size:
    from export.shapes import sizes

    # Of more than one item: torch takes an axis of one for a constant.
    return sizes(checkpoint)[1]


def _note_sizes(graphs: Sequence[Graph]) -> None:
    """Bytes of every file, and the share of the part's in fp32."""
    from export.trace import size

    whole = {graph.part: size(graph.path) for graph in graphs if graph.precision == "fp32"}
    for graph in graphs:
        count = size(graph.path)
        share = f", {count / whole[graph.part]:.3f} of fp32" if graph.part in whole else ""
        log.info("  %-15s %-5s %14d bytes%s", graph.part, graph.precision, count, share)


def _check(settings: Settings) -> tuple[Settings, tuple[str, ...]]:
    """The settings in full, and the parts to export in the order of `PARTS`.

    Raises:
        BundleError: they are wrong, or contradict each other.
    """
    for flag, names, known in (
        ("--precision", settings.precision, PRECISIONS),
        ("--parts", settings.parts, PARTS),
        ("--engines", settings.engines, ENGINES),
    ):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise BundleError(f"{flag} {unknown[0]!r} is not known; use {', '.join(known)}")
    if not settings.precision or not settings.engines:
        raise BundleError("--precision and --engines need a name each")
    require_seed(settings.seed)
    if not 0 < settings.merged <= 1:
        raise BundleError(f"--merged {settings.merged} is no share; use a number above 0, up to 1")
    if set(settings.precision) == {PRUNED}:
        raise BundleError(f"{PRUNED} is a file of the classifier alone; add fp32 to --precision")
    for precision in settings.precision:
        if not set(MAY_RUN[precision]) & set(settings.engines):
            raise BundleError(
                f"no engine of --engines {','.join(settings.engines)} may run {precision}; it "
                f"needs one of {', '.join(MAY_RUN[precision])}"
            )
    if settings.prompts < 0:
        raise BundleError(f"--prompts {settings.prompts} is less than none; use 0 or more")
    present = (settings.checkpoint / "classifier").is_dir()
    wanted = settings.parts or tuple(p for p in PARTS if p != "classifier" or present)
    absent = [part for part in GENERATOR_PARTS if part not in wanted]
    if absent:
        raise BundleError(
            f"--parts lacks {', '.join(absent)}, which every bundle has; only "
            f"{' and '.join(p for p in PARTS if p not in GENERATOR_PARTS)} may be left out"
        )
    if settings.out == Path():
        settings = replace(settings, out=Path("bundles") / settings.checkpoint.resolve().name)
    ordered = tuple(name for name in PRECISIONS if name in settings.precision)
    return replace(settings, precision=ordered), tuple(part for part in PARTS if part in wanted)


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


if __name__ == "__main__":
    # So that an export that is stopped takes its unfinished folder with it.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda got, _: sys.exit(128 + got))
    sys.exit(main())
