"""The schemas of requests with the bounds and defaults of the bundle that is served.

The models (`serving.wishes`, `serving.openai_schema`) say what holds for every bundle; what a
bundle adds is checked by the core, and written into the document here, so that both say the same.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from dermaflux.request import MAX_GUIDANCE, MAX_PROMPT
from serving.card import ModelCard
from serving.openai_schema import ImagesRequest
from serving.wishes import GenerateRequest, StreamRequest

_PRINTED = r"[^\u0000-\u001f\u007f-\u009f]*"
PLAIN_LINE = rf"^{_PRINTED}[^\s\u0000-\u001f\u007f-\u009f]{_PRINTED}$"
"""What `dermaflux.request` takes for a prompt: one line that is not blank. Without looking ahead,
which programs that make texts from patterns cannot do in reasonable time."""


def schemas(card: ModelCard, models: tuple[type[BaseModel], ...]) -> dict[str, Any]:
    """The JSON schema of each model by its name, for a service with this card."""
    _, found = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    named: dict[str, Any] = found["$defs"]
    for model in (GenerateRequest, StreamRequest):
        _bound(named[model.__name__]["properties"], card)
    _bound_openai(named[ImagesRequest.__name__]["properties"], card)
    return named


def _bound(fields: dict[str, Any], card: ModelCard) -> None:
    limits = card.limits
    size = {
        "minimum": limits.min_size,
        "maximum": limits.max_size,
        "multipleOf": limits.size_multiple,
    }
    for name in ("width", "height"):
        # pydantic writes optional values as anyOf(value, null).
        fields[name]["anyOf"][0].update(size)
    for name in ("steps", "guidance", "width", "height"):
        fields[name]["default"] = getattr(card.defaults, name)
    fields["prompt"]["anyOf"][0].update(_PROMPT)
    fields["n"]["maximum"] = limits.max_images
    _bound_steps(fields, card)


def _bound_openai(fields: dict[str, Any], card: ModelCard) -> None:
    limits = card.limits
    sides = range(limits.min_size, limits.max_size + 1)
    fitting = "|".join(str(side) for side in sides if side % limits.size_multiple == 0)
    fields["size"]["anyOf"][0]["pattern"] = f"^(auto|({fitting})x({fitting}))$"
    fields["model"]["anyOf"][0] = {"type": "string", "enum": [card.name, card.bundle]}
    fields["prompt"].update(_PROMPT)
    fields["n"]["anyOf"][0]["maximum"] = limits.max_images
    _bound_steps(fields, card)


def _bound_steps(fields: dict[str, Any], card: ModelCard) -> None:
    fields["steps"]["anyOf"][0].update({"minimum": 1, "maximum": card.limits.max_steps})
    if card.defaults.guidance is None:
        fields["guidance"]["anyOf"] = [{"type": "null"}]
    else:
        fields["guidance"]["anyOf"][0].update({"minimum": 0, "maximum": MAX_GUIDANCE})


_PROMPT = {"minLength": 1, "maxLength": MAX_PROMPT, "pattern": PLAIN_LINE}
