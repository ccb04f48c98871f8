"""OpenVINO as this package has it: imported without its model converter, one core a process.

>>> core().available_devices
['CPU']
"""

from __future__ import annotations

import sys
import threading
from typing import Any, Final

__all__ = ["core", "openvino"]

_CONVERTER: Final = "openvino.tools.ovc"

# OpenVINO goes without its model converter where there is none. It is not needed to run a model,
# takes long to import and brings a telemetry client along.
_absent = _CONVERTER not in sys.modules
if _absent:
    sys.modules[_CONVERTER] = None  # type: ignore[assignment]
try:
    import openvino
finally:
    if _absent:
        del sys.modules[_CONVERTER]

# The binding makes its table of types at the first question, under a lock of its own and without
# letting Python's go: two threads that ask first at once wait for each other for ever.
openvino.Type.f32.to_dtype()

_making = threading.Lock()
_cores: Final[list[Any]] = []


def core() -> Any:
    """The process's one `openvino.Core`, which is never let go.

    The plugin of each core gives the thread that first uses it a stack for signals, and takes it
    away at its own end. Of two cores that end in the order of their making, or of one that ends in
    another thread, a thread keeps a stack that is no more, and the next signal for which Python has
    a handler (SIGTERM, Ctrl-C) ends the process with a segmentation fault.
    """
    with _making:
        if not _cores:
            _cores.append(openvino.Core())
        return _cores[0]
