"""A change of each node of a kind in OpenVINO's model of a graph.

>>> changed(model, "Concat", rounded_before)      # how many were
4
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def changed(model: Any, kind: str, change: Callable[[Any], bool]) -> int:
    """Offer `change` every node of a kind, in order; how many it says that it changed. Types and
    shapes behind them are worked out anew."""
    # All of them first, since a change makes nodes and takes others away.
    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() == kind]
    count = sum(change(node) for node in nodes)
    if count:
        model.validate_nodes_and_infer_types()
    return count
