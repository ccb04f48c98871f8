"""Saliencies over pictures: where the classifier looked, and nothing where it did not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dermaflux.classifier import Classifier, preprocess
from dermaflux.engines.fake import Fake
from dermaflux.saliency import overlay, seen


@pytest.mark.parametrize(
    ("size", "crop", "box"),
    [
        ((200, 100), 1.0, (50, 0, 150, 100)),
        ((100, 200), 1.0, (0, 50, 100, 150)),
        ((64, 64), 1.0, (0, 0, 64, 64)),
        ((360, 360), 0.5, (90, 90, 270, 270)),
    ],
)
def test_what_is_seen_is_the_middle(tiny_bundle, size, crop, box):
    spec = replace(tiny_bundle.classifier, crop_pct=crop)
    assert seen(size, spec) == pytest.approx(box, abs=max(size) / 32)


@pytest.mark.parametrize("size", [(200, 100), (97, 390), (64, 64), (3000, 2000), (300, 1)])
def test_an_overlay_has_the_shape_of_its_picture_and_is_clear_outside(tiny_bundle, size):
    spec = replace(tiny_bundle.classifier, crop_pct=1.0)
    drawn = overlay(np.ones((4, 4), np.float32), size, spec)
    assert drawn.mode == "LA"
    assert max(drawn.size) == min(512, max(size))
    assert abs(drawn.width * size[1] - drawn.height * size[0]) <= max(size)
    grey, alpha = (np.asarray(band) for band in drawn.split())
    assert (grey == alpha).all()
    share = min(size) / max(size)
    assert (alpha == 255).mean() == pytest.approx(share, abs=0.03)


def test_the_place_that_was_looked_at_is_that_of_the_picture(tiny_bundle):
    """A classifier that looks at what is red marks the red corner of what it sees."""
    spec = replace(tiny_bundle.classifier, crop_pct=1.0)
    picture = np.zeros((100, 200, 3), np.uint8)
    picture[75:, 125:150, 0] = 255
    image = Image.fromarray(picture)

    def looks(inputs):
        red = inputs["pixel_values"][:, 0] > 0
        patches = red.reshape(len(red), 4, 8, 4, 8).mean((2, 4)).astype(np.float32)
        return {"logits": np.zeros((len(red), 2), np.float32), "saliency": patches}

    classifier = Classifier(spec, Fake(looks))
    (judged,) = classifier.judge([classifier.prepare(image, saliency=True)])
    assert judged.saliency is not None
    grey = np.asarray(overlay(judged.saliency, image.size, spec).split()[0]).astype(float)
    rows, columns = np.indices(grey.shape)
    assert abs((rows * grey).sum() / grey.sum() - 87) < 4
    assert abs((columns * grey).sum() / grey.sum() - 137) < 4
    assert preprocess(image, spec).shape == (3, 32, 32)


def test_prepared_pictures_are_judged_as_pictures_are(tiny_bundle):
    classifier = Classifier.open(tiny_bundle)
    pictures = [Image.new("RGB", (80, 70), (shade, 90, 80)) for shade in range(0, 250, 20)]
    judged = classifier.judge([classifier.prepare(one) for one in pictures])
    assert [one.prediction for one in judged] == classifier.classify(pictures)
    assert {one.saliency for one in judged} == {None}


def test_a_map_is_made_for_whom_it_is_asked_and_changes_no_answer(tiny_bundle):
    """One engine leaves the maps out; another is made at the first that is asked for, once."""
    made: list[Fake] = []
    seen: list[int] = []

    def looks(inputs):
        pixels = inputs["pixel_values"]
        seen.append(len(pixels))
        logits = np.stack([pixels[:, 0, 0, 0], pixels[:, 1, 0, 0]], 1)
        return {"logits": logits, "saliency": pixels[:, 0, ::8, ::8]}

    def lean(inputs):
        return {"logits": looks(inputs)["logits"]}

    def mapper() -> Fake:
        made.append(Fake(looks))
        return made[-1]

    classifier = Classifier(tiny_bundle.classifier, Fake(lean), mapper=mapper)
    shades = (10, 200, 90)
    pictures = [Image.new("RGB", (40, 40), (shade, 255 - shade, 0)) for shade in shades]
    plain = classifier.judge([classifier.prepare(one) for one in pictures])
    assert made == []
    asked = [classifier.prepare(one, saliency=number != 1) for number, one in enumerate(pictures)]
    found = [classifier.judge(asked), classifier.judge(asked)][1]
    assert len(made) == 1
    assert seen == [3, 3, 2, 3, 2]
    assert [one.prediction for one in found] == [one.prediction for one in plain]
    assert found[1].saliency is None
    for number in (0, 2):
        assert np.array_equal(found[number].saliency, asked[number].pixels[0, ::8, ::8])
