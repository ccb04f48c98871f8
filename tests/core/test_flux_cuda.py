"""What a GPU would be asked to do, as far as it shows without one: shapes, layouts, kernels.

Tensors here have a device "cuda" and no numbers; torch checks shapes and layouts as it would there.
"""

from __future__ import annotations

from collections import Counter

import pytest

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from benchmarks.gpu_shapes import FULL  # noqa: E402
from dermaflux.engines import flux, flux_engine, flux_fp8, flux_weights  # noqa: E402

DOUBLE, SINGLE = 2, 3
CONFIG = {**FULL.transformer, "num_layers": DOUBLE, "num_single_layers": SINGLE}


class Asked(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        self.calls[call.__name__.split(".")[0]] += 1
        return call(*args, **(kwargs or {}))


@pytest.fixture
def unreal():
    with FakeTensorMode():
        yield


def weights(low) -> flux.Flux:
    shapes = flux_weights.shapes(CONFIG)

    def named(name: str):
        return torch.empty(shapes[name], dtype=torch.bfloat16, device="cuda")

    return flux_weights.fused(CONFIG, named, low)


@pytest.mark.parametrize("low", [(), flux_fp8.LOW], ids=["bf16", "fp8"])
def test_a_forward_of_full_width(unreal, low):
    whole, layers = weights(low), 8 * DOUBLE + 2 * SINGLE
    image = FULL.image("schnell 512")
    tokens = torch.empty(1, FULL.tokens(image), 64, dtype=torch.bfloat16, device="cuda")
    text = torch.empty(1, image.text, 4096, dtype=torch.bfloat16, device="cuda")
    pooled = torch.empty(4, 768, dtype=torch.bfloat16, device="cuda")
    numbers = torch.empty(4, device="cuda")
    turn = torch.empty(FULL.tokens(image) + image.text, 64, 2, device="cuda")
    with torch.no_grad():
        table = flux.modulated(whole, numbers, pooled, numbers)
        embedded = flux.embedded(whole, text)
        with Asked() as asked:
            velocity = flux.velocity(whole, tokens, embedded, table[:1], turn)
    assert table.shape == (4, 12 * DOUBLE + 3 * SINGLE + 2, 3072)
    assert (velocity.shape, velocity.dtype) == (tokens.shape, torch.bfloat16)
    assert velocity.device.type == "cuda"
    assert asked.calls["_scaled_mm"] == (layers if low else 0)
    assert asked.calls["addmm"] == (2 if low else layers + 2), "the edges are never low"


def test_cudnn_is_asked_first_on_cuda_alone():
    from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

    before = _cur_sdpa_kernel_backends(with_priority=True)
    with flux_engine.attention_order(torch.device("cpu")):
        assert _cur_sdpa_kernel_backends(with_priority=True) == before
    with flux_engine.attention_order(torch.device("cuda")):
        order = _cur_sdpa_kernel_backends(with_priority=True)
    assert order[:2] == [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    assert _cur_sdpa_kernel_backends(with_priority=True) == before
