"""Which operators, types and opsets the ONNX parser of a TensorRT takes: published facts, as data.

`trt_support.json` holds the parser's support matrix of TensorRT 10.15 and what its releases before
and after added, with the documents that say so. A version between two that are named is read as the
older one, so that a newer TensorRT than we know of is not trusted with more.

    >>> support("10.14").lacks("RotaryEmbedding")
    "TensorRT 10.14 has no RotaryEmbedding; it came with 10.15"
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from onnx import TensorProto

from dermaflux.errors import EngineError

DATA: Final = Path(__file__).with_name("trt_support.json")
OLDEST: Final = "10.15"
"""The first TensorRT that takes our graphs; a test says so."""

TYPES: Final[Mapping[int, str]] = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.FLOAT8E4M3FN: "FP8",
    TensorProto.FLOAT4E2M1: "FP4",
    TensorProto.INT4: "INT4",
    TensorProto.INT8: "INT8",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.UINT8: "UINT8",
    TensorProto.BOOL: "BOOL",
}
"""ONNX's types that TensorRT has, by the names of its matrix."""


@dataclass(frozen=True)
class Support:
    """What one version's parser takes."""

    version: str
    opsets: tuple[int, int]
    operators: Mapping[str, frozenset[str]]
    """Operator -> types of its data; empty where they are not published."""
    since: Mapping[str, str]
    """Operator -> the version that added it."""

    def lacks(self, operator: str) -> str | None:
        """Why an operator cannot be built, or None where it can."""
        if operator in self.operators:
            return None
        came = self.since.get(operator)
        hint = f"it came with {came}" if came else "no version that we know of has it"
        return f"TensorRT {self.version} has no {operator}; {hint}"


def versions() -> tuple[str, ...]:
    """The versions that are known, oldest first."""
    return tuple(_data()["versions"])


def support(version: str) -> Support:
    """What the parser of a version takes; `11.4` and `11.4.0.106` are the same.

    Raises:
        EngineError: older than all that are known, or no version at all.
    """
    data = _data()
    wanted = _number(version)
    known = [v for v in data["versions"] if _number(v) <= wanted]
    if not known:
        raise EngineError(
            f"TensorRT {version} is too old; {OLDEST} and newer take our graphs, and what is "
            f"known begins with {data['versions'][0]}"
        )
    since = {o: v for v, added in data["since"].items() for o in added}
    listed = {o: frozenset(types.split()) for o, types in data["operators"].items()}
    operators = {o: listed.get(o, frozenset()) for o in {*listed, *since}}
    limit = data["opsets"][1]
    for came, opset in data["opset_since"].items():
        if _number(came) <= wanted:
            limit = max(limit, opset)
    return Support(
        version=known[-1],
        opsets=(data["opsets"][0], limit),
        operators={
            o: types
            for o, types in operators.items()
            if o not in since or _number(since[o]) <= wanted
        },
        since=since,
    )


@cache
def _data() -> Mapping[str, Any]:
    content = json.loads(DATA.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def _number(version: str) -> tuple[int, int]:
    try:
        major, minor = version.split(".")[:2]
        return int(major), int(minor)
    except ValueError:
        raise EngineError(f"{version!r} is not a version of TensorRT; write it as 11.4") from None
