"""The training itself: what follows from the seed, what a run keeps, what is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from training import classifier, data, draws, heads, optimizing, resuming, supervise
from training.pictures import Pictures
from training.recipe import Recipe, RecipeError
from training.targets import Targets

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
RECIPE = Recipe(
    model_args={**SMALL, "drop_path_rate": 0.2}, size=32, margin=4, steps=4, batch=8, warmup=1,
    threads=1, blur=0.5, cutout=0.5, vignette=0.5, precision="fp32",
)  # fmt: skip
BARE = replace(RECIPE, model_args=SMALL)


@pytest.fixture(scope="module")
def cache() -> Pictures:
    return Pictures(1)


@pytest.fixture
def train(dataset: Path) -> list[data.Sample]:
    return data.read(dataset, "train")


@pytest.fixture
def val(dataset: Path) -> list[data.Sample]:
    return data.read(dataset, "val")


def _equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _apart(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


@pytest.mark.parametrize(
    "recipe",
    [
        replace(RECIPE, precision="bf16"),
        replace(RECIPE, architecture="resnet10t", model_args={}, steps=2, mixup=0.3, cutmix=1.0),
        replace(RECIPE, augment="none", sampling="shuffled", class_weights="balanced",
                auxiliary=False),
        replace(RECIPE, augment="classic", sampling="labels", optimizer="adamw", layer_decay=0.75,
                schedule="cosine", ema=0.0),
    ],
)  # fmt: skip
def test_a_seed_and_steps_give_the_weights(
    train: list[data.Sample], cache: Pictures, recipe: Recipe
) -> None:
    torch.manual_seed(5)
    one, history = supervise.fit(train, recipe, pictures=cache)
    mine = torch.rand(3)
    torch.manual_seed(6)
    torch.rand(100)
    other, _ = supervise.fit(train, recipe, pictures=cache)
    assert _equal(one, other)
    assert history.steps == recipe.steps
    torch.manual_seed(5)
    assert torch.equal(mine, torch.rand(3))  # the caller's numbers are the caller's
    changed, _ = supervise.fit(train, replace(recipe, seed=1), pictures=cache)
    assert not _equal(one, changed)


def test_a_stopped_run_goes_on_to_the_bit(
    train: list[data.Sample], val: list[data.Sample], cache: Pictures, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    recipe = replace(RECIPE, evaluate=1, mixup=0.3, steps=5, sampling="shuffled")
    whole, history = supervise.fit(train, recipe, val, pictures=cache)
    step, file = supervise._Run._step, tmp_path / "vit.pt"

    def killed(run: Any, *arguments: Any) -> float:
        if run.history.steps == 3:
            run.save()
            raise KeyboardInterrupt
        return step(run, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(supervise._Run, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            supervise.fit(train, recipe, val, pictures=cache, state_file=file)
    again, resumed = supervise.fit(train, recipe, val, pictures=cache, state_file=file)
    assert _equal(whole, again)
    assert resumed.validation == history.validation
    assert (resumed.steps, resumed.kept) == (5, history.kept)
    with pytest.raises(data.DatasetError, match=r"on other pictures .*\(8 then, 7 now\)"):
        supervise.fit(train[1:], recipe, val, pictures=cache, state_file=file)
    with pytest.raises(data.DatasetError, match="another recipe"):
        supervise.fit(train, replace(recipe, steps=9), val, pictures=cache, state_file=file)


def test_parts_of_a_batch_add_up_to_it(train: list[data.Sample], cache: Pictures) -> None:
    """What one pass over a batch gives, passes over its parts give, with all that is averaged.

    Of AdamW: Muon rounds to bfloat16 inside, which makes more of the last bit.
    """
    recipe = replace(BARE, class_weights="1,3", mixup=0.4, optimizer="adamw")
    whole, _ = supervise.fit(train, recipe, pictures=cache)
    parts, _ = supervise.fit(train, replace(recipe, accumulate=4), pictures=cache)
    assert 0 < _apart(whole, parts) < 1e-5
    other, _ = supervise.fit(train, replace(recipe, class_weights="none"), pictures=cache)
    assert _apart(whole, other) > 1e-3


def test_the_best_weights_are_kept_and_patience_ends(
    train: list[data.Sample], val: list[data.Sample], cache: Pictures,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    found = iter([0.5, 0.4, 0.45, 0.6, 0.7, 0.1])
    monkeypatch.setattr(
        supervise._Run, "_measured",
        lambda run: {"step": run.history.steps, "loss": next(found), "auc": 0.5},
    )  # fmt: skip
    recipe = replace(RECIPE, steps=50, evaluate=1, patience=3)
    model, history = supervise.fit(train, recipe, val, pictures=cache)
    assert (history.steps, history.kept) == (5, 2)
    assert [one["loss"] for one in history.validation] == [0.5, 0.4, 0.45, 0.6, 0.7]
    # Two steps of fifty: the rate is the same as long as the schedule has not begun to fall.
    monkeypatch.setattr(supervise._Run, "over", lambda run: run.history.steps >= 2)
    two, _ = supervise.fit(train, replace(recipe, evaluate=0, patience=0), pictures=cache)
    assert _equal(model, two)


def test_validation_without_balance_counts_every_picture(
    train: list[data.Sample], val: list[data.Sample], cache: Pictures
) -> None:
    recipe = replace(BARE, evaluate=4, ema=0.0)
    one_sided = [s for s in val if s.lesion.label == "benign"] + val[1:2]
    _, balanced = supervise.fit(train, recipe, one_sided, pictures=cache)
    model, plain = supervise.fit(
        train, replace(recipe, sampling="shuffled"), one_sided, pictures=cache
    )
    logits = classifier.logits_of(model, cache.images(one_sided, 32))
    labels = np.array([0, 0, 0, 1])
    costs = np.log(np.exp(logits).sum(1)) - logits[np.arange(4), labels]
    assert plain.validation[-1]["loss"] == pytest.approx(costs.mean(), abs=1e-5)
    assert len(balanced.validation) == 1


def test_shuffled_shows_every_picture_once_an_epoch(train: list[data.Sample]) -> None:
    drawn = draws.Draws(train, replace(RECIPE, sampling="shuffled", batch=6))
    rows = torch.cat([drawn.rows(step) for step in range(8)])  # six epochs of eight pictures
    assert set(Counter(rows.tolist()).values()) == {6}
    for epoch in range(6):
        assert sorted(rows[8 * epoch : 8 * epoch + 8].tolist()) == list(range(8))
    assert replace(RECIPE, steps=None, epochs=3.0, batch=6).total(8) == 4


def test_labels_are_drawn_or_weighted_alike(train: list[data.Sample]) -> None:
    some = [s for s in train if s.lesion.label == "benign"] + train[1:2]
    weights = draws.label_weights(some)
    assert weights[:4].sum() == pytest.approx(float(weights[4]))
    assert draws.class_weights(some, "balanced").tolist() == pytest.approx([0.4, 1.6])
    assert draws.class_weights(some, "1,4").tolist() == [1, 4]


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_what_is_mixed_costs_by_its_shares(train: list[data.Sample], kind: str) -> None:
    recipe = replace(BARE, auxiliary=False, label_smoothing=0.0, **{kind: 1.0})
    drawn, boxes = draws.Draws(train, recipe), []
    for step in range(30):
        batch, box = drawn.mixed(step)
        boxes.append(box)
        rows = batch.pictures.float()[:, None, None].expand(-1, 32, 32)
        blend = draws.blended(rows, batch.share, box)
        share = batch.share * batch.pictures + (1 - batch.share) * batch.partners
        assert torch.allclose(blend.mean((1, 2)), share.float(), atol=1e-4)
    assert all(box is None for box in boxes) == (kind == "mixup")
    known = Targets.of(train, 8, Pictures(1))
    outputs = heads.Outputs(torch.randn(8, 2), *[torch.zeros(8, 0)] * 3)
    soft = nn.functional.one_hot(known.label[batch.pictures], 2) * batch.share
    soft = soft + nn.functional.one_hot(known.label[batch.partners], 2) * (1 - batch.share)
    expected = nn.functional.cross_entropy(outputs.logits, soft)
    cost, _ = heads.losses(
        outputs, known, batch, batch, torch.zeros(8, 32, 32), recipe, torch.ones(2)
    )
    assert torch.allclose(cost, expected, atol=1e-6)


def test_pictures_are_read_once(train: list[data.Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    cache, read = Pictures(1), []
    load = data.load_images

    def counted(samples: list[data.Sample], *rest: int) -> Any:
        read.append(len(samples))
        return load(samples, *rest)

    monkeypatch.setattr(data, "load_images", counted)
    supervise.fit(train[:4], RECIPE, pictures=cache)
    supervise.fit(train, RECIPE, pictures=cache)
    supervise.fit(train[2:], RECIPE, pictures=cache)
    assert read == [4, 4]
    assert np.array_equal(cache.images(train[3:5], 36), load(train[3:5], 36))


def test_layer_decay_slows_the_first_layers() -> None:
    recipe = replace(BARE, layer_decay=0.5, optimizer="adamw")
    model = heads.Supervised(recipe)
    (optimizer,) = optimizing.optimizers_of(model, recipe)
    optimizing.set_rate(optimizer, 1.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert named["vit.head.weight"] == named["mask.weight"] == 1
    assert named["vit.patch_embed.proj.weight"] < named["vit.blocks.0.attn.qkv.weight"]
    assert named["vit.blocks.1.attn.qkv.weight"] == 2 * named["vit.blocks.0.attn.qkv.weight"]
    both = optimizing.optimizers_of(model, replace(recipe, optimizer="muon"))
    counts = [sum(len(group["params"]) for group in one.param_groups) for one in both]
    assert counts[1] == 2 * 4  # the matrices of two blocks
    assert sum(counts) == len(list(model.parameters()))


def test_rates_rise_and_fall() -> None:
    recipe = replace(RECIPE, warmup=10, schedule="cosine")
    assert [optimizing.factor(step, 0.0, recipe) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert optimizing.factor(50, 0.5, recipe) == pytest.approx(0.5)
    assert optimizing.factor(99, 1.0, recipe) == pytest.approx(0)
    flat = replace(recipe, schedule="trapezoid")
    assert optimizing.factor(50, 0.3, flat) == pytest.approx(1)
    assert optimizing.factor(50, 0.65, flat) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"augment": "lots"}, "augment 'lots' is not known; use none, classic, dermoscopy"),
        ({"class_weights": "1;4"}, "neither none, nor balanced, nor two numbers"),
        ({"batch": 10, "accumulate": 4}, "has no 4 equal parts"),
        ({"batch": 6, "accumulate": 2, "mixup": 0.2}, "are no pairs"),
        ({"patience": 3}, "give evaluate"),
        ({"layer_decay": 0.0}, "layer_decay 0.0 is out of range; use 0.05 to 1"),
        ({"steps": 0}, "steps 0 is out of range"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        replace(RECIPE, **change)


def test_what_cannot_be_trained_is_a_sentence(
    train: list[data.Sample], val: list[data.Sample], cache: Pictures
) -> None:
    with pytest.raises(data.DatasetError, match="training pictures have no malignant lesion"):
        supervise.fit(train[::2], RECIPE, pictures=cache)
    with pytest.raises(data.DatasetError, match="validation pictures have no malignant lesion"):
        supervise.fit(train, replace(RECIPE, evaluate=2), val[::2], pictures=cache)
    with pytest.raises(RecipeError, match=r"vit_tinny_patch16_224 \(timm has vit_tiny_patch16_224"):
        classifier.build(replace(RECIPE, architecture="vit_tinny_patch16_224"))
    with pytest.raises(RecipeError, match="cannot be run on 32 x 32 pixels"):
        heads.Supervised(replace(RECIPE, model_args={}))
    with pytest.raises(RecipeError, match="does not end in one linear layer"):
        heads.Supervised(
            replace(RECIPE, architecture="deit_tiny_distilled_patch16_224", model_args=SMALL)
        )
    with pytest.raises(RecipeError, match="give a lower --rate"):
        supervise.fit(train, replace(RECIPE, rate=1e9, steps=20), pictures=cache)


def test_a_state_of_before_there_were_more_settings_goes_on(
    train: list[data.Sample], tmp_path: Path, cache: Pictures
) -> None:
    recipe, file = replace(RECIPE, blur=0.0, cutout=0.0, vignette=0.0), tmp_path / "vit.pt"
    supervise.fit(train, recipe, pictures=cache, state_file=file)
    state = torch.load(file, weights_only=True)
    for name in ("blur", "cutout", "vignette", "sampling"):
        del state["recipe"][name]
    for name in ("pictures", "best", "best_value", "since"):
        del state[name]
    torch.save(state, file)
    assert resuming.check(train, recipe, file).steps == 4
    with pytest.raises(data.DatasetError, match=r"blur 0\.0 instead of 0\.5"):
        resuming.check(train, replace(recipe, blur=0.5), file)
