"""Tables of the suite's ladders and of growth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from benchmarks.report_markdown import between, goals, markdown, number

SECTIONS: Final = {
    "generation": "Generation, from prompt to PNG",
    "classification": "Classification in process",
    "classification_other": "Classification in process, another model",
    "batches": "Several pictures at once",
}


def suite(result: Mapping[str, Any]) -> str:
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


def growth(result: Mapping[str, Any]) -> str:
    """A table an axis."""
    pieces = [f"Ours is {result['ours']}, theirs {result['theirs']}; milliseconds of one picture."]
    for axis, found in result["axes"].items():
        rows = [
            [
                number(point["x"]), f"{point['ours_ms']:.1f}", f"{point['theirs_ms']:.1f}",
                between(point["times"]), number(point.get("floor_ms")), number(point.get("gflop")),
                f"{point['psnr_db']:.1f}",
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
