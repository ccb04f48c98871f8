"""Calibration and sensitivity as commands of their own, on whatever machine holds the model.

    python -m export.quantize --calibrate models/mini --out mini.scales.npz
    python -m export.quantize --calibrate FLUX --out flux.scales.npz --device cuda --dtype bf16
    python -m export.quantize --calibrate FLUX --out flux.scales.npz --offload --dtype bf16
    python -m export.quantize --sensitivity models/mini --scales mini.scales.npz --precision fp8
    python -m export FLUX --out bundles/flux --precision fp32,fp8 --calibration flux.scales.npz

A calibration that was stopped goes on where it was when the same command is run again. Measured on
the trained mini (9 M parameters), 8 images of 20 steps against those of the fp32 graph, with ranges
by plain minimum and maximum, as here; milliseconds of CPU time of a step on one core at batch 1 and
4, where fp32 takes 19 and 66 on OpenVINO, 17 and 65 on ONNX Runtime, 43 and 123 in eager torch:

    quantizer                              worst, best image   latents   batch 1, 4   made in
    minimum and maximum                     50.3 to 55.0 dB     0.016     9, 29 ms        7 s
      second MLP layers left in fp32        53.3 to 58.1 dB     0.008    14, 51 ms        7 s
      modulations in int8 too               48.8 to 54.8 dB     0.018     9, 33 ms        9 s
    ONNX Runtime, percentile 99.99          47.6 to 57.2 dB     0.025    11, 28 ms       15 s
    NNCF, bias correction                   48.3 to 55.9 dB     0.014    14, 35 ms       14 s
    NNCF, SmoothQuant, bias correction      43.3 to 50.7 dB     0.037    13, 36 ms       20 s

Progress goes to stderr; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

from dermaflux import files
from dermaflux.checkpoint import Checkpoint
from dermaflux.command import ended
from dermaflux.errors import BundleError
from export.heap import MAPPED, unmap_from
from export.prompts import require_seed
from export.recipes import RECIPES, Recipe

QUANTIZED: Final = ("int8", "fp8")
PROMPTS: Final = 8
_CANDIDATES: Final = {
    "int8": Recipe(kind="int8", per_channel=True),
    "fp8": Recipe(kind="float8e4m3fn"),
}
"""How a part without a recipe is quantized when it is asked what that would cost."""
_DTYPES: Final = ("fp32", "bf16", "fp16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status is 0, or 2 with a sentence for the user."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("export").setLevel(logging.INFO)

    def work() -> None:
        unmap_from(MAPPED)
        result = _calibrate(options) if options.calibrate else _sensitivity(options)
        print(json.dumps(result), flush=True)

    return ended(work, "stopped; the same command goes on where it was")


def _calibrate(options: argparse.Namespace) -> dict[str, object]:
    # Not at the top: torch takes seconds to import, and a misspelt option none.
    import torch

    from export.calibrate import assume, calibrate
    from export.reference import read_requests, requests

    _check(options)
    checkpoint = Checkpoint.open(options.calibrate)
    out = options.out or Path(f"{checkpoint.path.name}.scales.npz")
    if options.assume is not None:
        table = assume(checkpoint, options.assume)
        table.save(out)
        return {"path": str(out), "assumed": True, "models": dict(table.models)}
    if options.requests is not None:
        asked = read_requests(checkpoint, options.requests)
    else:
        # Not the seed of the export's comparison: other prompts and noise than those compared.
        asked = requests(checkpoint, options.prompts, options.seed + 1)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]
    batch = options.batch if options.batch is not None else PROMPTS if options.offload else 1
    table = calibrate(
        checkpoint, asked, out,
        device=options.device, dtype=dtype, offload=options.offload, batch=batch,
    )  # fmt: skip
    counts = {part: len(channels) for part, channels in table.parts.items()}
    return {"path": str(out), "requests": table.done, "layers": counts, "models": table.models}


def _sensitivity(options: argparse.Namespace) -> dict[str, object]:
    from export.reference import Reference, requests
    from export.scales import Scales
    from export.sensitivity import block_of, kind_of, sensitivity
    from export.shapes import examples, sizes
    from export.trace import trace

    _check(options)
    checkpoint = Checkpoint.open(options.sensitivity)
    if options.scales is None:
        raise BundleError("--sensitivity needs --scales TABLE, which --calibrate makes")
    table = Scales.open(options.scales)
    part, precision = options.part, options.precision
    # A part without a recipe is asked what one would cost.
    recipe = RECIPES[precision].get(part, replace(_CANDIDATES[precision], keep=("*",)))
    channels = table.require(checkpoint.path, part)
    asked = requests(checkpoint, options.prompts, options.seed)
    reference = Reference.make(checkpoint, _parts(part), asked)
    model = trace(checkpoint.path, part, examples(checkpoint, part, sizes(checkpoint)[1]))
    rows = []
    print(f"{'block':<40}{'layers':>7}{'weights':>11}{'error':>12}", file=sys.stderr)
    group_of = {"block": block_of, "kind": kind_of}[options.by]
    cases = reference.seen[part]
    for row in sensitivity(model, recipe, channels, cases, precision, group_of):
        print(row, file=sys.stderr)
        rows.append(asdict(row))
    result = {
        "checkpoint": checkpoint.path.name,
        "part": part,
        "precision": precision,
        "prompts": options.prompts,
        "by": options.by,
        "blocks": rows,
    }
    if options.out is not None:
        files.write(options.out, (json.dumps(result, indent=2) + "\n").encode())
    return result


def _check(options: argparse.Namespace) -> None:
    """Before the minutes that all else takes.

    Raises:
        BundleError: an option is out of range, or `--out` cannot be written.
    """
    for name in ("prompts", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise BundleError(f"--{name} {value} measures nothing; use 1 or more")
    require_seed(options.seed)
    if options.assume is not None and not 0 < options.assume < math.inf:
        raise BundleError(f"--assume {options.assume} is no range; use a finite number above 0")
    if options.out is not None and options.out.is_dir():
        raise BundleError(f"--out {options.out} is a folder; give a file")


def _parts(part: str) -> tuple[str, ...]:
    from dermaflux.bundle import GENERATOR_PARTS

    return tuple(dict.fromkeys((*GENERATOR_PARTS, part)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.quantize",
        description="Measure a model's ranges, or what each of its blocks costs in 8 bits.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--calibrate", type=Path, metavar="CHECKPOINT", help="make a table of scales")
    what.add_argument(
        "--sensitivity", type=Path, metavar="CHECKPOINT", help="quantize one block at a time"
    )
    parser.add_argument("--out", type=Path, help="the table; default: NAME.scales.npz")
    parser.add_argument("--scales", type=Path, help="the table that --sensitivity reads")
    parser.add_argument("--precision", choices=QUANTIZED, default="fp8", help="default: fp8")
    parser.add_argument("--part", default="transformer", help="default: transformer")
    parser.add_argument(
        "--by",
        choices=("block", "kind"),
        default="block",
        help="with --sensitivity: one row a block, or one for all layers of a kind; default: block",
    )
    parser.add_argument(
        "--requests", type=Path, help="JSON lines of requests; default: the model's own prompts"
    )
    parser.add_argument("--prompts", type=int, default=PROMPTS, help=f"default: {PROMPTS}")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise; default: 0")
    parser.add_argument(
        "--assume",
        type=float,
        metavar="RANGE",
        help="measure nothing, and take RANGE for every range: to time an export, not to use it",
    )
    parser.add_argument(
        "--offload",
        action="store_true",
        help="with --calibrate: read each layer from the disk when its turn comes, for a model "
        "that does not fit into memory",
    )
    parser.add_argument(
        "--batch",
        type=int,
        help="with --calibrate: images that pass together; default: 1, or 8 "
        "with --offload, where a pass reads all weights once",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: cpu")
    parser.add_argument("--dtype", choices=_DTYPES, default="fp32", help="default: fp32")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
