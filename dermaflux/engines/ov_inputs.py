"""The inputs that a graph is handed, before OpenVINO gets them.

>>> require_inputs(graph, {"x": np.dtype("float32")}, {"x": x})
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dermaflux.engines import Arrays
from dermaflux.errors import EngineError


def require_inputs(graph: Path, wanted: Mapping[str, np.dtype[Any]], inputs: Arrays) -> None:
    """Nothing, where a graph's inputs are all there and no others, each of its type. OpenVINO would
    run on what an input held before where one is left out.

    Raises:
        EngineError: with the names, or the types.
    """
    if inputs.keys() != wanted.keys():
        raise EngineError(f"{graph} takes the inputs {sorted(wanted)}, not {sorted(inputs)}")
    for name, value in inputs.items():
        if value.dtype != wanted[name]:
            raise EngineError(f"input {name} needs {wanted[name]}, not {value.dtype}")
