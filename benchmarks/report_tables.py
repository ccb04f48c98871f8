"""Results as Markdown: one function a kind of result, each taking what its command wrote.

>>> print(tables("suite", result))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

TITLES: Final = {
    "suite": "Beside what users would pick instead",
    "growth": "How cost grows",
    "latency": "Latency by stage",
    "quality": "What precisions and tiers cost in quality",
    "cold_start": "Cold start",
    "http_classify": "Classification over HTTP",
    "gpu": "FLUX.1 at full size on a card",
}
SECTIONS: Final = {
    "generation": "Generation, from prompt to PNG",
    "classification": "Classification in process",
    "classification_other": "Classification in process, another model",
    "batches": "Several pictures at once",
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


def machine_line(result: Result) -> str:
    """What ran it: no table is without."""
    environment = result.get("environment", {})
    versions = environment.get("versions", {})
    shown = ("torch", "diffusers", "onnxruntime", "openvino", "timm")
    device = environment.get("device", {})
    card = device.get("name") if isinstance(device, Mapping) else None
    words = [
        *([f"**{card}**"] if card and card != "cpu" else []),
        f"{environment.get('processor', 'unknown processor')}, "
        f"{environment.get('usable_cores', environment.get('cores', '?'))} cores",
        ", ".join(f"{name} {versions[name]}" for name in shown if name in versions),
        ", ".join(environment.get("instructions", ())),
    ]
    line = "; ".join(word for word in words if word)
    load = [environment.get(name) for name in ("load_before", "load_after")]
    if None not in load:
        line += f". Load before and after: {load[0]}, {load[1]}"
        if load[0] > 1:
            line += " (**not a quiet machine**)"
    bundle = result.get("bundle")
    if isinstance(bundle, Mapping):
        line += f". Bundle {bundle.get('name')} `{bundle.get('id')}`"
    command = result.get("command")
    return f"{line}.\n\n`{command}`" if command else f"{line}."


def suite(result: Result) -> str:
    """Goals, then a ladder a section."""
    task = result.get("task", {})
    given = (
        f"All sides: {task.get('size', ['?', '?'])[0]} px, {task.get('steps')} steps, guidance "
        f"{task.get('guidance')}, text of {task.get('max_sequence_length')} tokens "
        f"(`max_sequence_length`; diffusers' own default is 512), the same noise, "
        f"{result.get('threads')} of the machine's threads."
    )
    pieces = [given, goals(result.get("goals", ()))]
    for name, section in result.get("sections", {}).items():
        heading = f"### {SECTIONS.get(name, name)}"
        if "architecture" in section:
            heading += f": {section['architecture']}, batch {section['batch']}"
        pieces += [heading, ladder(section["rows"])]
        pieces += [f"Left out: {side}: {why}." for side, why in section["left_out"].items()]
    return "\n\n".join(piece for piece in pieces if piece)


def goals(found: Iterable[Mapping[str, Any]]) -> str:
    """Needed, reached, met; what was missed in bold."""
    rows = []
    for one in found:
        needed = one.get("needed", one.get("least", one.get("most", one.get("goal_s"))))
        value = one.get("value", one.get("found", one.get("seconds")))
        met = {True: "met", False: "**missed**", None: "not measured"}[one.get("met")]
        shown = "no such row" if value is None else _n(value)
        rows.append([str(one.get("goal", one.get("row"))), _n(needed), shown, met])
    return markdown(("goal", "needed", "reached", ""), rows) if rows else ""


def ladder(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row a technique; milliseconds are of one picture."""
    shown = []
    for row in rows:
        times, step = row["times_baseline"], row["times_before"]
        name = f"**{row['name']}**" if row["ours"] else row["name"]
        wrong = " (**wrong: another output**)" if row["wrong"] else ""
        first = row is rows[0]
        shown.append(
            [
                name + (" (lossy)" if row["lossy"] else "") + wrong,
                row["technique"],
                f"{row['p50_ms']:.1f}",
                f"{row['p90_ms']:.1f}",
                "1"
                if first
                else f"{times['median']:.2f} ({times['low']:.2f} to {times['high']:.2f})",
                "" if first else f"{step['median']:.2f} × {row['before']}",
                f"{100 * row['floor_reached']:.0f} %" if "floor_reached" in row else "",
                likeness(row["alike"]),
                evidence(row["evidence"]),
            ]
        )
    head = ("", "technique", "ms, median", "p90", "times the first (95 %)", "times the one before",
            "of its floor", "like the first", "what ran")  # fmt: skip
    return markdown(head, shown)


def likeness(alike: Mapping[str, float]) -> str:
    """PSNR, or the largest change of a probability."""
    if "psnr_db" in alike:
        return f"{alike['psnr_db']:.1f} dB, worst {alike['worst_psnr_db']:.1f}"
    if "probability" in alike:
        return f"probability ± {alike['worst_probability']:.4f}"
    return ""


def evidence(found: Mapping[str, Any]) -> str:
    """The part of the evidence that shows a technique, in a few words."""
    part = found.get("transformer", found)
    if not isinstance(part, Mapping):
        return ""
    words = []
    if "engine" in part:
        words.append(f"{part['engine']} {part['precision']}")
    for kind, types in part.get("computes", {}).items():
        words.append(f"{kind}: " + ", ".join(f"{count} {name}" for name, count in types.items()))
    pictures = found.get("vae_decoder", {}).get("items") if part is not found else None
    if pictures:
        texts = found["text_encoder"]["items"]
        steps, texts = part["items"] / pictures, texts / pictures
        words.append(f"{steps:.3g} steps and {texts:.2g} texts computed a picture")
    if part.get("note"):
        words.append(part["note"])
    for name in ("graphs", "graph_breaks", "compile_s", "transformer_dtype", "dtype", "options"):
        if name in part:
            words.append(f"{name.replace('_', ' ')} {part[name]}")
    return "; ".join(words)


def growth(result: Result) -> str:
    """A table an axis."""
    pieces = [f"Ours is {result['ours']}, theirs {result['theirs']}; milliseconds of one picture."]
    for axis, found in result["axes"].items():
        rows = [
            [
                _n(point["x"]), f"{point['ours_ms']:.1f}", f"{point['theirs_ms']:.1f}",
                f"{point['times']['median']:.2f} ({point['times']['low']:.2f} to "
                f"{point['times']['high']:.2f})",
                _n(point.get("floor_ms")), _n(point.get("gflop")), f"{point['psnr_db']:.1f}",
            ]
            for point in found["points"]
        ]  # fmt: skip
        head = (axis, "ours", "theirs", "times (95 %)", "our floor", "GFLOP a call", "PSNR, dB")
        pieces.append(markdown(head, rows))
        if "exponents" in found:
            words = [f"{name.removesuffix('_ms')} {value:.2f}"
                     for name, value in found["exponents"].items()]  # fmt: skip
            pieces.append(f"Grows to the power of: {', '.join(words)}.")
        if axis == "steps" and "lines" in found:
            lines = {name.removesuffix("_ms"): one for name, one in found["lines"].items()}
            words = [f"{name} {one['fixed_ms']:.1f} ms and {one['each_ms']:.2f} ms a step"
                     for name, one in lines.items()]  # fmt: skip
            pieces.append(f"Through the points: {'; '.join(words)}.")
    return "\n\n".join(pieces)


def latency(result: Result) -> str:
    """A row a variant, the stages that it tells."""
    stages = ("encode", "denoise", "decode", "png", "total")
    rows = []
    for name, one in result["variants"].items():
        between = one.get("times_eager_95")
        times = _n(one.get("times_eager")) + (
            f" ({between[0]:.2f} to {between[1]:.2f})" if between else ""
        )
        reached = one.get("floor_reached")
        rows.append(
            [name, *(_n(one.get(f"{stage}_ms")) for stage in stages), _n(one.get("total_p90_ms")),
             times, "" if reached is None else f"{100 * reached:.0f} %", _n(one.get("peak_mb"))]
        )  # fmt: skip
    head = ("", *(f"{stage}, ms" for stage in stages), "p90", "times eager (95 %)",
            "of the fp32 floor, denoising", "largest memory, MB")  # fmt: skip
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
                [words.replace("_", " "), _n(row["psnr_db"]["median"]), _n(_worst(row["psnr_db"])),
                 _n(ssim.get("median") if isinstance(ssim, Mapping) else ssim),
                 _n(row.get("classifier", {}).get("labels_equal")), _n(times.get("median")),
                 _n(row.get("transformer_calls"))]
            )  # fmt: skip
    head = ("", "PSNR, dB", "worst", "SSIM", "classifier agrees", "times the reference", "forwards")
    return (
        f"Against {result['reference']}, {result['prompts']} prompts, {result['steps']} steps.\n\n"
        + markdown(head, rows)
    )


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
    """Goals, images a second by side and callers."""
    sides = result["sides"]
    counts = sorted({count for one in sides.values() for count in one.get("closed", {})}, key=int)
    rows = []
    for name, one in sides.items():
        closed = one.get("closed", {})
        rows.append(
            [name, str(one.get("settings", one.get("precision", ""))), _n(one.get("images_per_s")),
             *(_n(_rate(closed.get(count))) for count in counts),
             _n((one.get("open") or {}).get("p99_over_p50")), _n(one.get("cpu_s_per_1000"))]
        )  # fmt: skip
    head = ("", "settings", "images a second", *(f"at {count} callers" for count in counts),
            "p99 over p50 at half load", "CPU s for 1000")  # fmt: skip
    left = "\n\n".join(str(why) for why in result.get("left_out", {}).values())
    pieces = (goals(result.get("goals", ())), markdown(head, rows), left)
    return "\n\n".join(piece for piece in pieces if piece)


def gpu(result: Result) -> str:
    """Rows with seconds an image, floor and goal; what was left out and why."""
    rows = []
    for name, one in result["rows"].items():
        if "median_s" in one:
            reached = one.get("percent_of_floor")
            rows.append(
                [name, _n(one["median_s"]), _n(one.get("floor_s")),
                 "" if reached is None else f"{reached:.0f} %", _n(one.get("goal_s")),
                 _n(one.get("peak_gb"))]
            )  # fmt: skip
    note = "" if result.get("gpu_figure") else f"**{result.get('note', 'Not a GPU figure')}.**"
    left = [f"Left out: {name}: {why}." for name, why in result.get("left_out", {}).items()]
    head = ("", "seconds", "floor", "of it", "goal", "largest memory, GB")
    table = markdown(head, rows) if rows else ""
    pieces = (note, goals(result.get("goals", ())), table, *left)
    return "\n\n".join(piece for piece in pieces if piece)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; bars in cells are escaped."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _n(value: Any) -> str:
    """A number in three or four digits; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _worst(figures: Mapping[str, float]) -> float | None:
    return next((figures[name] for name in ("worst", "least", "min") if name in figures), None)


def _rate(closed: Any) -> Any:
    if isinstance(closed, Mapping):
        names = ("images_per_s", "per_second", "rate")
        return next((closed[name] for name in names if name in closed), None)
    return closed
