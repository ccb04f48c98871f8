"""The pieces of a report in Markdown: tables, numbers, goals, and the line of a machine.

>>> markdown(("", "ms"), [["ours", number(127.31)]])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks import others


def machine_line(result: Mapping[str, Any]) -> str:
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
    if busy := others.told(environment):
        line += f". {busy}"
    if others.quiet(environment) is False:
        line += " (**not a quiet machine**)"
    bundle = result.get("bundle")
    if isinstance(bundle, Mapping):
        line += f". Bundle {bundle.get('name')} `{bundle.get('id')}`"
    command = result.get("command")
    return f"{line}.\n\n`{command}`" if command else f"{line}."


def goals(found: Iterable[Mapping[str, Any]]) -> str:
    """Needed, reached and by what, met; what was missed in bold."""
    rows = []
    for one in found:
        bounds = ("needed", "at_least", "at_most", "goal_s")
        needed = next((one[name] for name in bounds if one.get(name) is not None), None)
        value = one.get("value", one.get("found", one.get("seconds")))
        met = {True: "met", False: "**missed**", None: "not measured"}[one.get("met")]
        missing = "" if one.get("met") is None else "no such row"
        shown = missing if value is None else number(value)
        if one.get("between"):
            shown += f" ({one['between'][0]:.2f} to {one['between'][1]:.2f})"
        by = one.get("row") if "goal" in one else None
        rows.append([str(one.get("goal", one.get("row"))), number(needed), shown, met, by or ""])
    return markdown(("goal", "needed", "reached", "", "by"), rows) if rows else ""


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; bars in cells are escaped."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: Any) -> str:
    """A number in three or four digits; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def between(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
