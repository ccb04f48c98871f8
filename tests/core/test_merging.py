"""Merging patches: nothing is lost on the way, as much is left as was asked for."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from dermaflux.engines.merging import Merged, merge, plan, unfit, work_left  # noqa: E402
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
    logits, features = Merged(whole, 0)(pixels)
    assert torch.allclose(logits, expected, atol=1e-6)
    assert torch.allclose(whole.model.get_classifier()(features), expected, atol=1e-6)
    merged = Merged(whole, 20)(pixels)[0]
    assert merged.shape == logits.shape
    assert 0 < (merged - logits).abs().max() < (logits.max() - logits.min())


@torch.inference_mode()
def test_merging_keeps_the_sum_of_all_and_joins_the_likest():
    torch.manual_seed(0)
    tokens = torch.randn(2, 1 + 12, 5)
    # A patch of the first set, and its like in the second: of the same direction.
    tokens[:, 1 + 4] = 2 * tokens[:, 1 + 7]
    joined, sizes = merge(tokens, 1, 1)
    assert joined.shape == (2, 12, 5)
    assert torch.equal(joined[:, 0], tokens[:, 0])
    pair = (tokens[:, 1 + 4] + tokens[:, 1 + 7]) / 2
    assert ((joined - pair[:, None]).abs().amax(-1) < 1e-6).sum(1).tolist() == [1, 1]
    most, sums = merge(tokens, 6, 1)
    for made, many in ((joined, sizes), (most, sums)):
        assert torch.allclose((made * many).sum(1), tokens.sum(1), atol=1e-5)
        assert many.sum(1).flatten().tolist() == [13, 13]
    assert most.shape == (2, 7, 5)


@torch.inference_mode()
def test_a_batch_is_merged_picture_by_picture():
    merged = Merged(Whole(), 20)
    pixels = torch.randn(4, 3, 64, 64)
    together = merged(pixels)[0]
    assert torch.allclose(together, torch.cat([merged(one[None])[0] for one in pixels]), atol=1e-6)


@pytest.mark.parametrize("share", [1.0, 0.8, 0.6, 0.5])
def test_as_much_work_is_left_as_was_asked_for(share):
    model = Whole().model
    count = plan(model, share)
    assert work_left(model, count) <= share
    assert work_left(model, count) > share - 0.02
    assert (count == 0) == (share == 1.0)


def test_what_cannot_be_merged_says_so():
    with pytest.raises(EngineError, match=r"leaves 0\.\d\d of the work at least, not 0.01"):
        plan(Whole().model, 0.01)
    with pytest.raises(EngineError, match="above 0, up to 1"):
        plan(Whole().model, 1.5)
    assert "resnet" in unfit(timm.create_model("test_resnet")).lower()
    assert "map" in unfit(Whole(global_pool="map").model)
    assert "MLP" in unfit(Whole(mlp_layer=timm.layers.SwiGLU).model)
    net = Whole()
    net.model = timm.create_model("test_efficientnet")
    with pytest.raises(EngineError, match="if it is a vision transformer"):
        Merged(net, 0)
