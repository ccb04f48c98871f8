"""The gate: thresholds read strictly, each rule alone, and verdicts that owe nothing to others."""

from __future__ import annotations

import builtins
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dermaflux import thumbnails
from dermaflux.classifier import Classifier
from dermaflux.engines import ORT
from dermaflux.engines.fake import Fake
from dermaflux.errors import DatasetError
from dermaflux.prompt import Lesion
from dermaflux.request import Request
from serving.batch.gate import Gate, Thresholds, reasons
from serving.batch.items import Item

ALONE = Thresholds(agreement="none", attributes=None)
BROWN, BLACK, SKIN = (92, 55, 40), (32, 26, 27), (226, 188, 168)


def item(**lesion) -> Item:
    asked = Lesion(**{"label": "benign", **lesion})
    return Item("0000000", 0, asked, Request("x", 0, 1, None, 96, 96))


def drawn(radius: float, colour=BROWN, seed: int = 0, side: int = 96) -> np.ndarray:
    """A disc on skin, with a little noise; `radius` is a share of the side."""
    picture = Image.new("RGB", (side, side), SKIN)
    edges = [side * (0.5 - radius), side * (0.5 + radius)]
    ImageDraw.Draw(picture).ellipse([edges[0], edges[0], edges[1], edges[1]], colour)
    noise = np.random.default_rng(seed).normal(0, 4, (side, side, 3))
    return (np.asarray(picture) + noise).clip(0, 255).astype(np.uint8)


def saying(bundle, probability: float) -> Classifier:
    """A classifier that gives every picture this probability of malignancy."""
    logits = np.array([0.0, math.log(probability / (1 - probability))], np.float32)
    spec = replace(bundle.classifier, temperature=1.0, threshold=0.4, abstain=(0.3, 0.5))
    return Classifier(spec, Fake(lambda inputs: {"logits": np.stack([logits])}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Thresholds()),
        ("# all as it is\n", Thresholds()),
        ("agreement: 0.5\n", Thresholds(agreement=0.5)),
        ("agreement: 1\n", Thresholds(agreement=1)),
        ("agreement: none\ncopies: none\n", Thresholds(agreement="none", copies=None)),
        ("agreement: off\nnearest: off\n", Thresholds(agreement="none", nearest=None)),
        ("attributes: []\n", Thresholds(attributes=())),
        ("attributes: none\n", Thresholds(attributes=None)),
        ("attributes: [size]\nsize_steps: 0\n", Thresholds(attributes=("size",), size_steps=0)),
        ("color_share: 0.1\nnearest: .8\ncopies: 0.9\n",
         Thresholds(color_share=0.1, nearest=0.8, copies=0.9)),
    ],
)  # fmt: skip
def test_thresholds_of_a_file(tmp_path, text, expected):
    (tmp_path / "gate.yaml").write_text(text)
    assert Thresholds.open(tmp_path / "gate.yaml") == expected
    # What a manifest holds makes the same thresholds again.
    assert Thresholds(**json.loads(json.dumps(asdict(expected)))) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("agreemnt: 0.5\n", "'agreemnt' is not a key; use agreement,"),
        ("agreement: label\n", "agreement is 'label'; use `decision`, `none`, or a number"),
        ("agreement: 1.5\n", "agreement is 1.5; .* from 0 to 1"),
        ("agreement: true\n", "agreement is true"),
        ("agreement: .nan\n", "agreement is nan"),
        ("agreement:\n", "agreement has no value"),
        ("attributes: size\n", "attributes is 'size'; use `none`, or a list"),
        ("attributes: [sizes]\n", "'sizes' is not known; use lesion, size, colors"),
        ("attributes: [border]\n", "border is measured and recorded, but too uncertain"),
        ("attributes: [size, size]\n", "names a word twice"),
        ("attributes: [[size]]\n", r"\['size'\] is not known"),
        ("size_steps: 1.0\n", "size_steps is 1.0; use a whole number"),
        ("size_steps: 4\n", "size_steps is 4"),
        ("size_steps: true\n", "size_steps is true"),
        ("size_steps: none\n", "size_steps cannot be off"),
        ("color_share: -0.1\n", "color_share is -0.1"),
        ("nearest: '0.7'\n", "nearest is '0.7'"),
        ("copies: 0.5\n", "copies is 0.5; .* from 0.7 to 1"),
        ("copies: 0.8\ncopies: 0.9\n", "line 2: 'copies' stands there twice"),
        ("- agreement\n", "needs keys with values"),
        ("attributes: [null]\n", "attributes: null is not known"),
        ("agreement: [\n", "line 2: expected the node content"),
        ("agreement: !!python/object/apply:os.getcwd []\n", "line 1: the tag .* is not taken"),
        ("copies: 2001-99-99\n", "line 1: '2001-99-99': month"),
        ("a: " + "[" * 1000 + "\n", "line 1: .* too deeply"),
        ("nearest: &a 0.7\ncopies: *a\n", "line 2: aliases"),
        ("nearest: " + "7" * 5000 + "\n", "line 1: .*more than 300 characters"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, text, words):
    (tmp_path / "gate.yaml").write_text(text)
    with pytest.raises(DatasetError, match=words) as caught:
        Thresholds.open(tmp_path / "gate.yaml")
    assert "gate.yaml" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DatasetError, match="there is no file"):
        Thresholds.open(tmp_path / "none.yaml")
    (tmp_path / "gate.yaml").write_bytes(b"agreement: \xff\n")
    with pytest.raises(DatasetError, match="byte 12 is not UTF-8"):
        Thresholds.open(tmp_path / "gate.yaml")


@pytest.mark.parametrize(
    ("agreement", "probability", "asked", "expected"),
    [
        ("decision", 0.2, "benign", ()),
        ("decision", 0.4, "benign", ()),  # an abstention
        ("decision", 0.4, "malignant", ()),
        ("decision", 0.9, "benign",
         ("the classifier says malignant (0.9000 malignant), asked was benign",)),
        ("decision", 0.03, "malignant",
         ("the classifier says benign (0.0300 malignant), asked was malignant",)),
        ("none", 0.9, "benign", ()),
        (0.6, 0.4, "benign", ()),
        (0.6, 0.41, "benign",
         ("the classifier gives benign a probability of 0.5900, needed is 0.6",)),
        (0.6, 0.6, "malignant", ()),
        (0.0, 0.01, "malignant", ()),
    ],
)  # fmt: skip
def test_agreement(tiny_bundle, agreement, probability, asked, expected):
    gate = Gate(replace(ALONE, agreement=agreement), saying(tiny_bundle, probability))
    (verdict,) = gate.judge([item(label=asked)], [drawn(0.2)])
    assert verdict.reasons == expected
    assert verdict.measures["probability"] == pytest.approx(probability)
    assert verdict.measures["decision"] in ("benign", "malignant", "abstain")


def test_a_classifier_is_needed_only_where_it_is_asked():
    with pytest.raises(DatasetError, match="has none; turn that off with `agreement: none`"):
        Gate(Thresholds())
    assert Gate(ALONE).judge([item()], [drawn(0.2)])[0].measures == {}


@pytest.mark.parametrize(
    ("radius", "asked", "steps", "passes"),
    [
        (0.15, "small", 0, True),
        (0.15, "medium", 0, False),
        (0.15, "medium", 1, True),
        (0.15, "large", 1, False),
        (0.3, "medium", 0, True),
        (0.3, "edge", 1, False),
        (0.3, "edge", 2, True),
        (0.3, None, 0, True),
    ],
)
def test_size(radius, asked, steps, passes):
    gate = Gate(Thresholds(agreement="none", size_steps=steps))
    (verdict,) = gate.judge([item(size=asked)], [drawn(radius)])
    assert (not verdict.reasons) == passes
    assert verdict.measures["size"] == ("small" if radius < 0.2 else "medium")
    if not passes:
        assert f"asked was {asked}" in verdict.reasons[0]
        assert Gate(Thresholds(agreement="none", attributes=())).judge(
            [item(size=asked)], [drawn(radius)]
        )[0] == replace(verdict, reasons=())


def test_colours():
    gate = Gate(Thresholds(agreement="none"))
    asked = [item(colors=colors) for colors in (("dark brown",), ("black", "dark brown"), ())]
    verdicts = gate.judge(asked, [drawn(0.25)] * 3)
    assert [len(one.reasons) for one in verdicts] == [0, 1, 0]
    assert verdicts[1].reasons[0].startswith("black has a share of 0.0")
    assert gate.judge([item(colors=("black",))], [drawn(0.25, BLACK)])[0].reasons == ()
    assert gate.judge([item(colors=("skin-coloured",))], [drawn(0.25)])[0].reasons == ()


def test_bare_skin_is_no_lesion():
    skin = drawn(0.001)
    (verdict,) = Gate(Thresholds(agreement="none")).judge([item(size="large")], [skin])
    assert verdict.reasons == ("no lesion is seen",)
    assert verdict.measures["found"] is False
    lenient = Gate(Thresholds(agreement="none", attributes=("size", "colors")))
    assert lenient.judge([item(size="large")], [skin])[0].reasons == ()


def test_pictures_seen_in_training(tmp_path):
    random = np.random.default_rng(3)
    seen, new = (random.integers(0, 256, (48, 48, 3), dtype=np.uint8) for _ in range(2))
    Image.fromarray(seen).save(tmp_path / "seen.png")
    index = thumbnails.build([("seen.png", "", tmp_path / "seen.png")]).index
    copy = np.ascontiguousarray(seen[::-1, ::-1])
    verdicts = Gate(ALONE, None, index).judge([item()] * 2, [copy, new])
    assert "it is near seen.png, which was seen in training" in verdicts[0].reasons[0]
    assert verdicts[1].reasons == ()
    assert [one.measures["nearest"] for one in verdicts] == ["seen.png"] * 2
    off = Gate(replace(ALONE, nearest=None), None, index).judge([item()], [copy])
    assert off[0] == replace(verdicts[0], reasons=())
    empty = thumbnails.build([]).index
    assert Gate(ALONE, None, empty).judge([item()], [copy])[0].measures == {}


def hostile() -> list[np.ndarray]:
    """Flat, torn, tiny, oblong and noisy pictures."""
    random = np.random.default_rng(0)
    pictures = [np.full((64, 64, 3), value, np.uint8) for value in (0, 1, 128, 254, 255)]
    pictures += [np.full((64, 64, 3), colour, np.uint8) for colour in ([255, 0, 0], [0, 0, 255])]
    for height, width in ((1, 1), (1, 40), (16, 16), (64, 16), (17, 130)):
        pictures.append(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        pictures.append(np.zeros((height, width, 3), np.uint8))
    half = np.zeros((64, 64, 3), np.uint8)
    half[:, 32:] = 255
    dot = np.full((64, 64, 3), 200, np.uint8)
    dot[31, 31] = 0
    return [*pictures, half, dot, drawn(0.25), drawn(0.7), drawn(0.1, BLACK)]


def test_no_picture_stops_the_gate_and_neighbours_do_not_count(tiny_bundle, tmp_path):
    listed = []
    for number in range(60):  # more than are compared at once
        file = tmp_path / f"{number}.png"
        Image.fromarray(drawn(0.1 + number / 200, seed=number)).save(file)
        listed.append((file.name, "", file))
    index = thumbnails.build(listed).index
    gate = Gate(Thresholds(), Classifier.open(tiny_bundle, ORT), index)
    pictures = hostile()
    asked = [item(size="medium", colors=("black", "reddish"))] * len(pictures)
    together = gate.judge(asked, pictures)
    assert len({one.measures["similarity"] for one in together}) > 3
    assert (together[0].measures["nearest"], together[0].measures["similarity"]) == (None, 0)
    for one, picture in zip(together, pictures, strict=True):
        assert gate.judge(asked[:1], [picture]) == [one]
        # JSON has no numbers that are not finite, and no numpy.
        text = json.dumps(one.measures, allow_nan=False)
        assert json.loads(text) == one.measures
        # A record can be judged again.
        assert reasons(gate.thresholds, asked[0].lesion, json.loads(text)) == one.reasons
    assert gate.judge([], []) == []


def test_without_scikit_image_the_gate_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **options):
        if name.startswith("dermaflux") and "attributes" in (rest[2] or ()):
            raise ModuleNotFoundError("No module named 'skimage'")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(DatasetError, match=r"pip install '\.\[batch\]'"):
        Gate(Thresholds(agreement="none"))
    Gate(ALONE)
