"""What the project wants to reach, and whether a run of the suite did. Missed ones are told.

>>> goals_of(result["sections"])[0]
{'goal': 'generation, times diffusers eager fp32, PSNR 42 dB or more', 'needed': 3.0, 'value': 2.9,
 'met': False, 'row': 'openvino int8, text known', 'between': [2.84, 2.97]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

GENERATION: Final = 3.0
GENERATION_DB: Final = 42.0
INT8: Final = 3.9
PRUNED: Final = 6.0
_ARCHITECTURE: Final = "vit_base_patch16_224"
"""The shape that the goals of classification are for."""


def goals_of(sections: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry a goal whose section was measured: goal, value, needed, met, and which row."""
    found: list[dict[str, Any]] = []
    if "generation" in sections:
        rows = [row for row in sections["generation"]["rows"]
                if row["ours"] and row["alike"].get("psnr_db", 0) >= GENERATION_DB]  # fmt: skip
        words = f"generation, times diffusers eager fp32, PSNR {GENERATION_DB:g} dB or more"
        found.append(_goal(words, GENERATION, [row for row in rows if not row["lossy"]]))
        if any(row["lossy"] for row in rows):
            found.append(_goal(f"{words}, lossy tiers too", GENERATION, rows))
    for section in ("classification", "classification_other"):
        if sections.get(section, {}).get("architecture") != _ARCHITECTURE:
            continue
        rows = [row for row in sections[section]["rows"] if row["ours"]]
        words = f"classification, {_ARCHITECTURE}, times timm eager fp32"
        small = [row for row in rows if "int8" in row["name"]]
        found.append(_goal(f"{words}, int8", INT8, [row for row in small if not row["lossy"]]))
        found.append(_goal(f"{words}, pruned", PRUNED, [row for row in small if row["lossy"]]))
    return found


def _goal(words: str, needed: float, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The best of these rows against what is needed; without a row the goal is missed."""
    if not rows:
        return {"goal": words, "needed": needed, "value": None, "met": False, "row": None}
    best = max(rows, key=lambda row: float(row["times_baseline"]["median"]))
    times = best["times_baseline"]
    return {
        "goal": words,
        "needed": needed,
        "value": times["median"],
        "met": times["median"] >= needed,
        "row": best["name"],
        "between": [times["low"], times["high"]],
    }
