"""Merging patches: nothing is lost on the way, as much is left as was asked for."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from dermaflux.engines.merging import Merged, merge, plan, unfit, work  # noqa: E402
from dermaflux.errors import EngineError  # noqa: E402

SMALL = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}


class Whole:
    """What `Merged` takes: a part with a model."""

    def __init__(self, **more) -> None:
        torch.manual_seed(0)
        arguments = {**SMALL, **more}
        self.model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **arguments).eval()


@pytest.mark.parametrize(
    "more",
    [{}, {"global_pool": "avg"}, {"reg_tokens": 3}, {"init_values": 0.5}, {"qk_norm": True},
     {"global_pool": "avg", "class_token": False}],
)  # fmt: skip
@torch.inference_mode()
def test_without_merges_it_is_the_whole_model(more):
    whole = Whole(**more)
    pixels = torch.randn(3, 3, 64, 64)
    expected = whole.model(pixels)
    logits, features = Merged(whole, [0] * 4)(pixels)
    assert torch.allclose(logits, expected, atol=1e-6)
    assert torch.allclose(whole.model.get_classifier()(features), expected, atol=1e-6)
    merged = Merged(whole, [16, 8, 4, 0])(pixels)[0]
    assert merged.shape == logits.shape
    assert 0 < (merged - logits).abs().max() < (logits.max() - logits.min())


@torch.inference_mode()
def test_merging_keeps_the_sum_of_all_and_joins_the_likest():
    torch.manual_seed(0)
    tokens = torch.randn(2, 1 + 12, 5)
    keys = tokens.clone()
    # A patch of the first set, and its double in the second.
    keys[:, 1 + 4] = keys[:, 1 + 7]
    joined, sizes = merge(tokens, None, keys, 1, 1)
    assert joined.shape == (2, 12, 5)
    assert torch.equal(joined[:, 0], tokens[:, 0])
    assert torch.allclose((joined * sizes).sum(1), tokens.sum(1), atol=1e-5)
    pair = (tokens[:, 1 + 4] + tokens[:, 1 + 7]) / 2
    assert ((joined - pair[:, None]).abs().amax(-1) < 1e-6).sum(1).tolist() == [1, 1]
    again, sums = merge(joined, sizes, torch.randn(2, 12, 5), 4, 1)
    assert again.shape == (2, 8, 5)
    assert torch.allclose((again * sums).sum(1), tokens.sum(1), atol=1e-5)
    assert sums.sum(1).flatten().tolist() == [13, 13]


@torch.inference_mode()
def test_a_batch_is_merged_picture_by_picture():
    merged = Merged(Whole(), [16, 8, 4, 0])
    pixels = torch.randn(4, 3, 64, 64)
    together = merged(pixels)[0]
    assert torch.allclose(together, torch.cat([merged(one[None])[0] for one in pixels]), atol=1e-6)


@pytest.mark.parametrize("share", [1.0, 0.8, 0.6, 0.45])
def test_as_much_work_is_left_as_was_asked_for(share):
    counts = plan(Whole().model, share)
    whole = work(65, 32, 128, [0] * 4)
    assert work(65, 32, 128, counts) <= share * whole
    assert work(65, 32, 128, counts) > (share - 0.06) * whole
    assert counts[-1] == 0
    assert list(counts) == sorted(counts, reverse=True)
    assert (counts == (0, 0, 0, 0)) == (share == 1.0)


def test_what_cannot_be_merged_says_so():
    with pytest.raises(EngineError, match=r"leaves 0\.\d\d of the work at least, not 0.01"):
        plan(Whole().model, 0.01)
    with pytest.raises(EngineError, match="above 0, up to 1"):
        plan(Whole().model, 1.5)
    assert "resnet" in unfit(timm.create_model("test_resnet")).lower()
    assert "map" in unfit(Whole(global_pool="map").model)
    net = Whole()
    net.model = timm.create_model("test_efficientnet")
    with pytest.raises(EngineError, match="if it is a vision transformer"):
        Merged(net, [0])
