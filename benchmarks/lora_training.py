"""Speed and memory of LoRA training, beside diffusers' own script on the same base and pictures.

    python -m benchmarks.lora_training --script train_dreambooth_lora_flux.py \\
        --base models/mini --data dataset --out benchmarks/results/lora_training_mini.json

`--script` is `examples/dreambooth/train_dreambooth_lora_flux.py` of huggingface/diffusers, which is
not part of this repository; it runs unchanged (`benchmarks.diffusers_script` opens the tokenizers).
Both sides are processes that take turns, with the same base, pictures, squares of `--resolution`,
batch, rank, adapted layers (all linears of all blocks), AdamW, clipping, threads and type; latents
and texts are encoded once, in both; the weights that the two adapters hold are counted and must be
as many. A step is timed twice: by the progress bar of a run of `--warm` + `--steps` steps, its
first ones left out, and as the difference of that run's whole time and that of one of `--warm`
steps; so is the time of all processors, which a busy machine moves less (with `--ours=--compile`
the differences mean nothing: the later run finds what the earlier one compiled). Ratios are of runs
of one round, figures are medians over rounds, memory is the largest that the system saw of a
process (on a GPU, that torch took there). The floor is the operations of a step
(`benchmarks.lora_flops`) over the rate of a large matrix product here.

`--blocks 19,38` trains a transformer of FLUX.1's size with random weights in place of the base's,
with the base's texts and autoencoder: it takes 24 GB of disk and as much of a GPU, and more for
activations (`--checkpointing` for less).
Progress goes to stderr; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.diffusers_script import PEAK
from benchmarks.lora_flops import linears, step_flops
from benchmarks.lora_sides import ADAPTERS, BARS, SIDES, Plan, link_pictures, weights_of
from benchmarks.machine import environment
from benchmarks.watched import Watched, watch
from dermaflux import files
from dermaflux.checkpoint import Checkpoint
from dermaflux.command import ended
from dermaflux.errors import BundleError, EngineError


@dataclass(frozen=True)
class Trained:
    """One side's share of a round; seconds of a step by both clocks and of processors, `own` as it
    says itself."""

    step_s: float
    step_s_by_difference: float
    step_cpu_s: float
    first_step_s: float
    peak_bytes: int
    weights: int
    own_samples_per_s: float | None = None


def one_round(
    plan: Plan, work: Path, warm: int, steps: int, order: Sequence[str] = SIDES
) -> dict[str, Trained]:
    """Both sides once, a short run each and then a long one each; `work` is emptied again.

    Raises:
        EngineError: a process failed, or the two trained different numbers of weights.
    """
    short: dict[str, Watched] = {}
    found: dict[str, Trained] = {}
    for count in (warm, warm + steps):
        for side in order:
            out = work / "run"
            try:
                command = plan.command(side, out, count)
                seen = watch(command, BARS[side], plan.environment)
                if count == warm:
                    short[side] = seen
                    continue
                weights = weights_of(out / ADAPTERS[side])
                found[side] = _trained(plan, side, short[side], seen, weights, warm, steps)
            finally:
                shutil.rmtree(out, ignore_errors=True)
            print(f"{side}: {found[side].step_s:.3f} s a step", file=sys.stderr)
    counts = {side: one.weights for side, one in found.items()}
    if len(set(counts.values())) > 1:
        raise EngineError(
            f"the two trained different numbers of weights, {counts}: their speeds do not compare"
        )
    return found


def _trained(
    plan: Plan, side: str, short: Watched, seen: Watched, weights: int, warm: int, steps: int
) -> Trained:
    own, peak = None, seen.peak_bytes
    if side == "dermaflux":
        report = json.loads(seen.output.splitlines()[-1])
        own = float(report["samples_per_s"])
        if plan.device != "cpu":
            peak = int(report["peak_bytes"])
    elif plan.device != "cpu":
        peak = int(seen.errors.rpartition(PEAK)[2].split()[0])
    return Trained(
        step_s=seen.step_s(after=warm),
        step_s_by_difference=(seen.seconds - short.seconds) / steps,
        step_cpu_s=(seen.cpu_s - short.cpu_s) / steps,
        first_step_s=seen.steps[min(seen.steps)],
        peak_bytes=peak,
        weights=weights,
        own_samples_per_s=own,
    )


def summary(
    rounds: Sequence[Mapping[str, Trained]], batch: int, floor_s: float
) -> dict[str, dict[str, Any]]:
    """Medians by side, and of the rounds' ratios to the other side (above 1: faster)."""
    table: dict[str, dict[str, Any]] = {}
    for side, other in (SIDES, SIDES[::-1]):
        rows, beside = [r[side] for r in rounds], [r[other] for r in rounds]
        step = statistics.median(row.step_s for row in rows)
        apart = statistics.median(row.step_s_by_difference for row in rows)
        own = [row.own_samples_per_s for row in rows if row.own_samples_per_s is not None]
        ratios = [b.step_s / a.step_s for a, b in zip(rows, beside, strict=True)]
        table[side] = {
            "steps_per_s": round(1 / step, 4),
            "samples_per_s": round(batch / step, 3),
            # So few steps that noise outweighs them have no speed by this clock.
            "samples_per_s_by_difference": round(batch / apart, 3) if apart > 0 else None,
            "samples_per_s_by_itself": round(statistics.median(own), 3) if own else None,
            "cpu_s_per_step": round(statistics.median(row.step_cpu_s for row in rows), 4),
            "first_step_s": round(statistics.median(row.first_step_s for row in rows), 2),
            "peak_bytes": round(statistics.median(row.peak_bytes for row in rows)),
            "weights": rows[0].weights,
            "floor_reached": round(floor_s / step, 4),
            f"times_{other}": round(statistics.median(ratios), 3),
            f"times_{other}_by_round": [round(ratio, 3) for ratio in ratios],
        }
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(words)
    for name in ("steps", "batch", "resolution", "rounds", "threads", "rank", "warm"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} measures nothing; use 1 or more")
    return ended(lambda: run(options, words))


def run(options: argparse.Namespace, words: Sequence[str]) -> None:
    """Measure, and print the result as one line of JSON; `words` are those of the command line."""
    if not options.script.is_file():
        raise EngineError(
            f"{options.script} is not there; give examples/dreambooth/"
            "train_dreambooth_lora_flux.py of a checkout of huggingface/diffusers as --script"
        )
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        plan, flops, config = _prepare(options, work)
        rate = _in_process(
            "from benchmarks.lora_flops import matmul_rate; "
            f"print(matmul_rate({plan.device!r}, {plan.dtype!r}))",
            plan.environment,
        )
        floor_s = flops / float(rate)
        rounds = []
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            # Whoever goes first in one round goes second in the next.
            order = SIDES if number % 2 == 0 else SIDES[::-1]
            rounds.append(one_round(plan, work, options.warm, options.steps, order))
    result = {
        "benchmark": "lora_training",
        "command": " ".join(["python -m benchmarks.lora_training", *words]),
        "environment": _environment(plan),
        "base": options.base.name,
        "transformer": config,
        "layers": len(plan.layers),
        "rank": plan.rank,
        "resolution": plan.resolution,
        "text_tokens": plan.text_length,
        "batch": plan.batch,
        "dtype": plan.dtype,
        "checkpointing": plan.checkpointing,
        "warm": options.warm,
        "steps": options.steps,
        "rounds": options.rounds,
        "floor": {
            "step_gflop": round(flops / 1e9, 2),
            "matmul_gflops": round(float(rate) / 1e9, 1),
            "step_ms": round(1e3 * floor_s, 2),
        },
        "sides": summary(rounds, plan.batch, floor_s),
    }
    if options.out is not None:
        files.write(options.out, (json.dumps(result, indent=2) + "\n").encode())
    print(json.dumps(result))


def _prepare(options: argparse.Namespace, work: Path) -> tuple[Plan, int, dict[str, Any]]:
    """What both sides are told, the operations of a step, and the transformer's configuration."""
    checkpoint = Checkpoint.open(options.base)
    model = checkpoint.model
    if options.resolution % (2 * model.scale):
        raise BundleError(
            f"--resolution {options.resolution} is not a multiple of {2 * model.scale}, a token's "
            f"side in {options.base}"
        )
    base = options.base
    if options.blocks is not None:
        base = work / "base"
        double, single = options.blocks
        shape = _shape(options.base)
        _in_process(
            "from pathlib import Path; from benchmarks.wide import write_checkpoint; "
            f"print(write_checkpoint(Path({str(base)!r}), Path({str(options.base)!r}), "
            f"{double}, {single}, {shape!r}))"
        )
    config = json.loads((base / "transformer/config.json").read_text())
    known = ("num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads",
             "in_channels", "joint_attention_dim")  # fmt: skip
    config = {name: config[name] for name in known}
    pictures = work / "pictures"
    prompt = link_pictures(options.data, pictures, options.batch)
    plan = Plan(
        script=options.script, base=base, data=options.data, pictures=pictures, prompt=prompt,
        text_length=model.text_length, layers=tuple(one.name for one in linears(config)),
        batch=options.batch, resolution=options.resolution, rank=options.rank,
        device=options.device, threads=options.threads, checkpointing=options.checkpointing,
        more=tuple(shlex.split(options.ours)),
    )  # fmt: skip
    flops = step_flops(
        config, image_tokens=(options.resolution // (2 * model.scale)) ** 2,
        text_tokens=model.text_length, batch=options.batch, rank=options.rank,
    )  # fmt: skip
    return plan, flops, config


def _shape(base: Path) -> dict[str, Any]:
    """FLUX.1's width on another checkpoint's texts."""
    from benchmarks.wide import WIDE

    own = json.loads((base / "transformer/config.json").read_text())
    same = ("in_channels", "joint_attention_dim", "pooled_projection_dim", "guidance_embeds")
    return {**WIDE, **{name: own[name] for name in same}}


def _in_process(code: str, more: Mapping[str, str] | None = None) -> str:
    """What code prints that imports torch: this process stays small, as `watch` needs it."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **(more or {})}
    )
    if done.returncode:
        raise EngineError(f"{code} failed: {done.stderr[-2000:]}")
    return done.stdout.strip()


def _environment(plan: Plan) -> dict[str, Any]:
    found = environment()
    found["versions"] |= {name: version(name) for name in ("accelerate", "peft", "transformers")}
    return found | {"threads": plan.threads, "device": plan.device}


def _pair(text: str) -> tuple[int, int]:
    double, single = (int(number) for number in text.split(","))
    return double, single


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lora_training", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--script", type=Path, required=True, help="diffusers' Flux LoRA script")
    parser.add_argument("--base", type=Path, default=Path("models/mini"))
    parser.add_argument("--data", type=Path, required=True, help="a dataset's folder")
    parser.add_argument("--blocks", type=_pair, help="DOUBLE,SINGLE of FLUX.1's width instead")
    parser.add_argument("--steps", type=int, default=40, help="steps that count [40]")
    parser.add_argument("--warm", type=int, default=6, help="steps before them [6]")
    parser.add_argument("--batch", type=int, default=4, help="pictures of a step [4]")
    parser.add_argument("--resolution", type=int, default=128, help="side in pixels [128]")
    parser.add_argument("--rank", type=int, default=64, help="LoRA's rank, and its alpha [64]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--checkpointing", action="store_true", help="recompute, in both")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores"
    )
    parser.add_argument("--ours", default="", help="further options of training.lora: '--compile'")
    parser.add_argument("--work", type=Path, help="where to write; default: the system's choice")
    parser.add_argument("--out", type=Path, help="write the result here too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
