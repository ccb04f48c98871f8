"""Results as Markdown: one function a kind of result, each taking what its command wrote.

>>> print(tables("suite", result))
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from benchmarks.report_ladders import growth, suite
from benchmarks.report_markdown import between, goals, markdown, number

TITLES: Final = {
    "suite": "Beside what users would pick instead",
    "growth": "How cost grows",
    "latency": "Latency by stage",
    "quality": "What precisions and tiers cost in quality",
    "cold_start": "Cold start",
    "http_classify": "Classification over HTTP",
    "gpu": "FLUX.1 at full size on a card",
}
Result = Mapping[str, Any]


def tables(kind: str, result: Result) -> str:
    """The tables of a result."""
    match kind:
        case "suite":
            return suite(result)
        case "growth":
            return growth(result)
        case "latency":
            return latency(result)
        case "quality":
            return quality(result)
        case "cold_start":
            return cold_start(result)
        case "http_classify":
            return http(result)
        case "gpu":
            return gpu(result)
    raise AssertionError(f"no table of {kind}")


def latency(result: Result) -> str:
    """A row a variant, the stages that it tells."""
    stages = ("encode", "denoise", "decode", "png", "total")
    rows = []
    own = all("denoise" in one.get("floors", ()) for one in result["variants"].values())
    whose = "its" if own else "the fp32"
    for name, one in result["variants"].items():
        between = one.get("times_eager_95")
        times = number(one.get("times_eager")) + (
            f" ({between[0]:.2f} to {between[1]:.2f})" if between else ""
        )
        floor = one["floors"]["denoise"] if own else {}
        reached = floor.get("reached_as_quantized", one.get("floor_reached"))
        rows.append(
            [name, *(number(one.get(f"{stage}_ms")) for stage in stages),
             number(one.get("total_p90_ms")), times,
             "" if reached is None else f"{100 * reached:.0f} %", number(one.get("peak_mb"))]
        )  # fmt: skip
    head = ("", *(f"{stage}, ms" for stage in stages), "p90", "times eager (95 %)",
            f"of {whose} floor, denoising", "largest memory, MB")  # fmt: skip
    return f"{result.get('size', ['?'])[0]} px, {result.get('steps')} steps.\n\n" + markdown(
        head, rows
    )


def quality(result: Result) -> str:
    """A row a variant, with its controls of fewer steps at the same time."""
    rows = []
    for name, one in result["variants"].items():
        found = {name: one}
        found |= {f"{name}: {kind}": control for kind, control in one.items()
                  if isinstance(control, Mapping) and "psnr_db" in control}  # fmt: skip
        for words, row in found.items():
            times = row.get("times_reference", {})
            ssim = row.get("ssim", {})
            rows.append(
                [words.replace("_", " "), number(row["psnr_db"]["median"]),
                 number(row["psnr_db"].get("worst")),
                 number(ssim.get("median") if isinstance(ssim, Mapping) else ssim),
                 number(row.get("classifier", {}).get("labels_equal")), number(times.get("median")),
                 number(row.get("transformer_calls"))]
            )  # fmt: skip
    head = ("", "PSNR, dB", "worst", "SSIM", "classifier agrees", "times the reference", "forwards")
    words = f"Against {result['reference']}, {result['prompts']} prompts, {result['steps']} steps."
    return "\n\n".join((words, markdown(head, rows), *_photographs(result.get("classifier"))))


def _photographs(found: Mapping[str, Any] | None) -> Iterable[str]:
    """The classifier's precisions and tiers on real photographs, where there were any."""
    if not found:
        return
    yield (
        f"The classifier on {found['photographs']} photographs ({found['malignant']} malignant) "
        f"against {found['reference']}:"
    )
    yield markdown(
        ("", "AUC", "change (95 %)", "largest change of a probability", "labels changed"),
        [
            [name, number(one["auc"]),
             f"{one['auc_change']:+.4f} ({one['auc_change_95'][0]:+.4f} to "
             f"{one['auc_change_95'][1]:+.4f})", number(one["probability_change_most"]),
             number(one["labels_changed"])]
            for name, one in found["variants"].items()
        ],
    )  # fmt: skip


def cold_start(result: Result) -> str:
    """Seconds by stage, of every kind of start."""
    rows = [
        [kind, ", ".join(f"{name.removesuffix('_s').replace('_', ' ')} {seconds:.2f}"
                         for name, seconds in stages.items())]
        for kind, stages in result["medians"].items()
    ]  # fmt: skip
    state = "met" if result.get("goal_met") else "**missed**"
    words = (
        f"First image after {result['first_image_s']} s from the start of the process, page cache "
        f"{result.get('page_cache')}; the goal of {result['goal_s']} s is {state}."
    )
    return words + "\n\n" + markdown(("start", "seconds, medians"), rows)


def http(result: Result) -> str:
    """Goals, ratios, and images a second and waits by side and callers."""
    sides = result["sides"]
    counts = sorted({count for one in sides.values() for count in one.get("closed", {})}, key=int)
    rows = []
    for name, one in sides.items():
        told = one.get("settings") or f"{one.get('engine', '')} {one.get('precision', '')}".strip()
        closed = one.get("closed", {})
        rows.append(
            [name + " (lossy)" * bool(one.get("lossy")), str(told), number(one.get("images_per_s")),
             *(_closed(closed.get(count, ())) for count in counts),
             number((one.get("open") or {}).get("p99_over_p50")), number(one.get("cpu_s_per_1000"))]
        )  # fmt: skip
    callers = (f"{count} callers: a second, p50 and p99 ms" for count in counts)
    head = ("", "settings", "images a second", *callers, "p99 over p50 at half load",
            "CPU s for 1000")  # fmt: skip
    ratios = [[f"ours, {name}", between(one)] for name, one in result.get("ratios", {}).items()]
    pieces = (
        goals(result.get("goals", ())),
        markdown(head, rows),
        markdown(("ratio within rounds", "(95 %)"), ratios) if ratios else "",
        *(str(why) for why in result.get("left_out", {}).values()),
    )
    return "\n\n".join(piece for piece in pieces if piece)


def gpu(result: Result) -> str:
    """Rows with seconds an image, floor and goal; what was left out and why."""
    rows = []
    for name, one in result["rows"].items():
        if "median_s" in one:
            reached = one.get("percent_of_floor")
            rows.append(
                [name, number(one["median_s"]), number(one.get("floor_s")),
                 "" if reached is None else f"{reached:.0f} %", number(one.get("goal_s")),
                 number(one.get("peak_gb"))]
            )  # fmt: skip
    note = "" if result.get("gpu_figure") else f"**{result.get('note', 'Not a GPU figure')}.**"
    left = [f"Left out: {name}: {why}." for name, why in result.get("left_out", {}).items()]
    head = ("", "seconds", "floor", "of it", "goal", "largest memory, GB")
    table = markdown(head, rows) if rows else ""
    pieces = (note, goals(result.get("goals", ())), table, *left)
    return "\n\n".join(piece for piece in pieces if piece)


def _closed(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Medians over the rounds of a closed loop."""
    if not rounds:
        return ""
    waits = [one.get("latency_ms") or {} for one in rounds]
    shown = [_middle([one.get("images_per_s") for one in rounds])]
    shown += [_middle([one.get(name) for one in waits]) for name in ("p50", "p99")]
    return ", ".join(value for value in shown if value)


def _middle(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return number(statistics.median(known)) if known else ""
