"""GPU figures through a stand-in for NVML."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from serving.gpu import Gpus


class NVMLError(Exception):
    pass


class Nvml:
    """Two GPUs, the second of which does not tell its temperature."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken
        self.starts = 0

    def nvmlInit(self) -> None:
        if self.broken:
            raise NVMLError("driver not loaded")
        self.starts += 1

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=80e9, used=(handle + 1) * 1e9)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=50 + handle)

    def nvmlDeviceGetTemperature(self, handle: int, kind: int) -> int:
        if handle == 1:
            raise NVMLError("not supported")
        return 61


@pytest.fixture(autouse=True)
def all_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def exposed(nvml: Nvml) -> tuple[CollectorRegistry, str]:
    registry = CollectorRegistry()
    registry.register(Gpus(nvml))
    return registry, generate_latest(registry).decode()


def test_figures_are_read_when_asked_for() -> None:
    nvml = Nvml()
    registry, text = exposed(nvml)
    assert "dermaflux_gpu_memory_used_bytes" in text
    read = registry.get_sample_value
    assert read("dermaflux_gpu_memory_used_bytes", {"gpu": "1"}) == 2e9
    assert read("dermaflux_gpu_memory_bytes", {"gpu": "0"}) == 80e9
    assert read("dermaflux_gpu_utilization_ratio", {"gpu": "0"}) == 0.5
    assert read("dermaflux_gpu_temperature_celsius", {"gpu": "0"}) == 61
    assert read("dermaflux_gpu_temperature_celsius", {"gpu": "1"}) is None
    assert nvml.starts == 1


def test_only_gpus_that_are_ours_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    registry, _ = exposed(Nvml())
    read = registry.get_sample_value
    assert read("dermaflux_gpu_memory_used_bytes", {"gpu": "0"}) == 2e9
    assert read("dermaflux_gpu_memory_used_bytes", {"gpu": "1"}) is None


def test_without_a_driver_or_bindings_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exposed(Nvml(broken=True))[1] == ""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert list(Gpus().collect()) == []
