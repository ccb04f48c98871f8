"""What NVIDIA's GPUs are doing, read at the moment of asking: memory, load, temperature.

Through NVML's own bindings where they are installed (`nvidia-ml-py`) and the driver is loaded;
else there are no such figures, and nothing is imported. The label is the GPU's place in
`CUDA_VISIBLE_DEVICES`: a uuid would change with the card.

    >>> exposition(registry, now=[Gpus()])      # dermaflux_gpu_memory_used_bytes{gpu="0"} 1.2e+10
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from dermaflux.hardware import handles

if TYPE_CHECKING:
    from prometheus_client.core import GaugeMetricFamily

logger = logging.getLogger(__name__)

_FIGURES: dict[str, tuple[str, Callable[[Any, Any], float]]] = {
    "memory_used_bytes": (
        "Memory of the GPU in use, by whomever.",
        lambda nvml, handle: nvml.nvmlDeviceGetMemoryInfo(handle).used,
    ),
    "memory_bytes": (
        "Memory of the GPU.",
        lambda nvml, handle: nvml.nvmlDeviceGetMemoryInfo(handle).total,
    ),
    "utilization_ratio": (
        "Share of the last moment in which the GPU computed, 0 to 1.",
        lambda nvml, handle: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
    ),
    "temperature_celsius": (
        "Temperature of the GPU.",
        lambda nvml, handle: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
    ),
}


class Gpus:
    """A collector of prometheus_client; `nvml` stands in for the bindings in tests."""

    def __init__(self, nvml: Any = None) -> None:
        self._nvml = nvml or _bindings()
        self._started = False

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One metric for each figure, of all GPUs; none where NVML does not answer."""
        from prometheus_client.core import GaugeMetricFamily

        nvml = self._nvml
        if nvml is None:
            return
        try:
            if not self._started:
                nvml.nvmlInit()
                self._started = True
            found = list(handles(nvml))
        except nvml.NVMLError as error:
            logger.debug("no GPU figures: %s", error)
            return
        for name, (words, read) in _FIGURES.items():
            metric = GaugeMetricFamily(f"dermaflux_gpu_{name}", words, labels=["gpu"])
            for place, handle in enumerate(found):
                try:
                    metric.add_metric([str(place)], float(read(nvml, handle)))
                except nvml.NVMLError:
                    # Not every GPU, nor every slice of one, tells everything.
                    continue
            if metric.samples:
                yield metric


def _bindings() -> Any:
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml  # type: ignore[import-untyped]

    return pynvml
