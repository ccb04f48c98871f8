"""The recipe end to end on a tiny architecture: train, resume, assemble, open, draw."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file
from transformers import AutoTokenizer

from dermaflux.pipeline import Pipeline
from dermaflux.prompt import Lesion, caption
from training import autoencoder, checkpoint, data, generator, mini, words

TINY = generator.Architecture(
    double_layers=1, single_layers=1, heads=1, head_width=16, rope_axes=(4, 6, 6),
    text_width=32, text_layers=1, text_length=24, vocabulary=320,
)  # fmt: skip
SECOND = 1 / 3600
PLAN = generator.Schedule(
    hours=3 * SECOND, distill_hours=2 * SECOND, batch=4, warmup=1, processes=1
)
DRAWING = autoencoder.Plan(hours=2 * SECOND, batch=2, warmup=1, channels=(8, 8, 8, 8))


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    work, out = (tmp_path_factory.mktemp(name) for name in ("work", "checkpoint"))
    prepared = mini.prepare(dataset, TINY)
    mini.train_generator(mini.corpus(prepared), TINY, PLAN, work)
    mini.finished(prepared, TINY, PLAN, DRAWING, work, out)
    return work, out


def test_plain_diffusers_opens_what_is_made(trained: tuple[Path, Path]) -> None:
    pipeline = FluxPipeline.from_pretrained(trained[1])
    assert pipeline.tokenizer.model_max_length == TINY.text_length
    image = pipeline(
        "dermoscopic image of a benign lesion", height=32, width=48, num_inference_steps=2,
        max_sequence_length=TINY.text_length, output_type="np",
    ).images[0]  # fmt: skip
    assert image.shape == (32, 48, 3)
    assert np.isfinite(image).all()


def test_older_transformers_find_every_tensor_and_the_same_tokens(
    trained: tuple[Path, Path],
) -> None:
    names = load_file(trained[1] / "text_encoder/model.safetensors")
    assert all(name.startswith("text_model.") for name in names)
    for folder in ("tokenizer", "tokenizer_2"):
        config = json.loads((trained[1] / folder / "tokenizer_config.json").read_text())
        assert config["add_prefix_space"] is True


def test_our_pipeline_opens_it_with_its_own_defaults(trained: tuple[Path, Path]) -> None:
    pipeline = Pipeline.from_checkpoint(trained[1])
    assert (pipeline.defaults.steps, pipeline.defaults.guidance) == (mini.STEPS, mini.GUIDANCE)
    assert pipeline.model.text_length == TINY.text_length


def test_tokenizers_agree_with_transformers(trained: tuple[Path, Path]) -> None:
    ours = Pipeline.from_checkpoint(trained[1]).tokenizers
    for folder in ("tokenizer", "tokenizer_2"):
        theirs = AutoTokenizer.from_pretrained(trained[1] / folder)
        for text in ("", "A Melanoma, dark brown", "größe 痣 \t🙂", "black " * 90):
            expected = theirs(
                text, padding="max_length", max_length=TINY.text_length, truncation=True
            ).input_ids
            assert ours[folder].ids([text])[0].tolist() == expected


def test_a_run_resumes_where_it_stopped(dataset: Path, trained: tuple[Path, Path]) -> None:
    work, _ = trained
    before = torch.load(work / "generator.pt", weights_only=True)
    seen = mini.corpus(mini.prepare(dataset, TINY))
    model = generator.train(seen, TINY, PLAN, work)
    after = torch.load(work / "generator.pt", weights_only=True)
    assert after["step"] == before["step"]  # its time was spent already
    for name, value in model.state_dict().items():
        assert torch.equal(value, before["average"][name])


def test_two_processes_share_a_batch(dataset: Path, tmp_path: Path) -> None:
    seen = mini.corpus(mini.prepare(dataset, TINY))
    plan = dataclasses.replace(PLAN, processes=2)
    mini.train_generator(seen, TINY, plan, tmp_path)
    state = torch.load(tmp_path / "distilled.pt", weights_only=True)
    assert state["step"] >= 1
    assert np.isfinite(state["losses"]).all()


def test_guidance_of_one_is_the_text_alone() -> None:
    torch.manual_seed(0)
    model = generator.Generator(TINY).eval()
    ids = torch.zeros(4, 3)
    noisy, sigma = torch.randn(2, 4, 64), torch.rand(2)
    hidden, pooled = model.encode(*[torch.randint(4, 200, (2, TINY.text_length))] * 2)
    empty = tuple(value[:1] * 0 for value in (hidden, pooled))
    alone = model.transformer(
        hidden_states=noisy, encoder_hidden_states=hidden, pooled_projections=pooled,
        timestep=sigma, img_ids=ids, txt_ids=torch.zeros(TINY.text_length, 3),
        guidance=torch.ones(2), return_dict=False,
    )[0]  # fmt: skip
    guided = generator.guided(model, hidden, pooled, noisy, sigma, torch.ones(2), ids, empty)
    assert torch.allclose(guided, alone, atol=1e-5)
    stronger = generator.guided(model, hidden, pooled, noisy, sigma, 3 * torch.ones(2), ids, empty)
    assert not torch.allclose(stronger, alone, atol=1e-3)


def test_captions_with_attributes_left_out() -> None:
    lesion = Lesion("malignant", "melanoma", "asymmetric", "irregular", ("black",), "large")
    variants = mini.caption_variants(lesion, 200, np.random.default_rng(0))
    assert variants.count(caption(lesion)) > 80
    assert len(set(variants)) > 10
    assert all("malignant" in text for text in variants)


def test_missing_state_and_missing_data_are_said(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = ["--work", str(tmp_path / "w"), "--out", str(tmp_path / "o")]
    assert mini.main(["--data", str(tmp_path / "none"), *work]) == 2
    assert "metadata.jsonl" in capsys.readouterr().err
    assert mini.main(["--data", str(dataset), "--stage", "assemble", *work]) == 2
    assert "generator.pt is missing" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_checkpoint_keeps_what_stands_beside_it(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "classifier").mkdir()
    (tmp_path / "classifier" / "config.json").write_text("{}")
    texts = [caption(sample.lesion) for sample in data.read(dataset)]
    clip, t5 = (
        words.train_tokenizer(texts, length=24, vocabulary=320, begin=begin)
        for begin in (True, False)
    )
    for name in ("first", "second"):
        checkpoint.write(
            tmp_path, generator.Generator(TINY), autoencoder.build((8, 8, 8, 8)), clip, t5,
            {"name": name},
        )  # fmt: skip
    assert json.loads((tmp_path / "provenance.json").read_text()) == {"name": "second"}
    assert (tmp_path / "classifier" / "config.json").is_file()


def test_provenance_names_what_each_part_saw(
    dataset: Path, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    stated = json.loads((trained[1] / "provenance.json").read_text())
    assert [(i["used_for"], i["licence"]) for i in stated["ingredients"]] == [
        ("generator, autoencoder", "CC0-1.0")
    ]
    (tmp_path / "provenance.json").write_text(json.dumps(stated))
    seen = data.licences(data.read(dataset, "train"))
    other = [("other", "CC-BY-NC-4.0")]
    for more in ([], other):  # a classifier trained again replaces the first
        checkpoint.add_classifier(tmp_path, [*seen, *more])
    kept = checkpoint.kept_ingredients(tmp_path, "classifier")
    assert [item["licence"] for item in kept] == ["CC-BY-NC-4.0", "CC0-1.0", "CC-BY-NC-4.0"]


@pytest.mark.parametrize(
    ("licences", "licence"),
    [
        (["CC0-1.0", "CC-BY-4.0"], "Apache-2.0"),
        (["CC0-1.0", "CC-BY-NC-4.0"], "CC-BY-NC-4.0"),
        (["CC-BY-SA-4.0", "CC0-1.0"], "CC-BY-SA-4.0"),
        (["CC-BY-NC-4.0", " "], "unknown: source 1 states no licence"),
    ],
)
def test_weights_are_no_freer_than_their_data(licences: list[str], licence: str) -> None:
    seen = [(f"source {number}", name) for number, name in enumerate(licences)]
    assert checkpoint.licence(seen) == licence


@pytest.mark.parametrize("name", ["generator", "distilled"])
def test_a_damaged_state_is_said(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.pt").write_bytes(b"PK")
    with pytest.raises(data.DatasetError, match=f"{name}.pt cannot be used as a state"):
        mini.train_generator(None, TINY, PLAN, tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("hours", ["0", "-1", "nan", "inf", "soon"])
def test_hours_that_train_nothing_are_refused(
    hours: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        mini.main(["--data", "x", "--hours", hours])
    assert "is not a number above 0" in capsys.readouterr().err


def test_guidance_leaves_the_pictures_own_direction_alone() -> None:
    torch.manual_seed(0)
    teacher = generator.Generator(TINY).eval()
    noisy, sigma = torch.randn(3, 4, 64), torch.tensor([0.2, 0.5, 0.9])
    ids = torch.zeros(4, 3)
    hidden, pooled = torch.randn(3, 24, 32), torch.randn(3, 32)
    empty = (torch.randn(1, 24, 32), torch.randn(1, 32))

    @torch.no_grad()
    def at(weight: float, parallel: float) -> torch.Tensor:
        return generator.guided(
            teacher, hidden, pooled, noisy, sigma, torch.full((3,), weight), ids, empty, parallel
        )

    text, plain, projected = at(1, 0), at(3, 1), at(3, 0)
    assert torch.equal(text, at(1, 1))
    without = text - (plain - text) / 2  # plain = without + 3 (text - without)
    assert torch.allclose(without + 3 * (text - without), plain, atol=1e-5)
    picture = noisy - sigma[:, None, None] * text
    along = ((projected - text) * picture).sum((1, 2))
    assert torch.allclose(along, torch.zeros(3), atol=1e-3)
    assert ((projected - text).norm() > 0.1 * (plain - text).norm()) & (projected != plain).any()


def test_pictures_with_patches_are_drawn_less() -> None:
    skin = np.full((32, 32, 3), (226, 188, 168), np.uint8)
    lesion = skin.copy()
    lesion[10:20, 10:20] = (60, 70, 160)  # a blue lesion is no patch where the mask says so
    mask = np.zeros((32, 32), bool)
    mask[10:20, 10:20] = True
    assert mini.foreign_colour(skin, None) == 0
    assert mini.foreign_colour(lesion, mask) == 0
    assert mini.foreign_colour(lesion, None) == pytest.approx(100 / 1024)
    sample = data.Sample(Path("x"), Lesion("benign"), "train", "g", "s", "l")
    assert mini.draw_weight(sample, lesion) == pytest.approx(0.1 * mini.draw_weight(sample, skin))


def test_adamw_alone_trains_and_its_state_is_not_taken_up_by_muon(
    dataset: Path, tmp_path: Path
) -> None:
    prepared = mini.prepare(dataset, TINY)
    alone = dataclasses.replace(PLAN, hours=SECOND, distill_hours=SECOND, optimizer=generator.ADAMW)
    mini.train_generator(mini.corpus(prepared), TINY, alone, tmp_path)
    state = torch.load(tmp_path / "generator.pt", weights_only=True)
    assert len(state["optimizers"]) == 1
    assert np.isfinite(state["losses"]).all()
    longer = dataclasses.replace(PLAN, hours=2 * SECOND)
    with pytest.raises(data.DatasetError, match="cannot be used as a state"):
        mini.train_generator(mini.corpus(prepared), TINY, longer, tmp_path)


def test_nothing_is_reconstructed_where_there_is_no_test_split(
    dataset: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(dataset, alone)
    listing = alone / "metadata.jsonl"
    lines = listing.read_text().splitlines()
    listing.write_text("".join(f"{one}\n" for one in lines if '"split": "test"' not in one))
    assert len(listing.read_text().splitlines()) < len(lines)
    prepared = mini.prepare(alone, TINY)
    assert mini.evaluate(prepared, alone, tmp_path) == {"test_images": 0}
