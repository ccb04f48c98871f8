"""The numpy pipeline over eager torch equals diffusers' FluxPipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dermaflux import flow
from dermaflux.engines import EAGER
from dermaflux.errors import EngineError
from dermaflux.pipeline import Pipeline
from tests.tiny import CAPTIONS, write_checkpoint

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

FORMS = [{}, {"guided": False}, {"shifting": False}]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small take longer to share out than to compute, most of all on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=FORMS, ids=["dev", "schnell", "static shift"])
def any_checkpoint(request: pytest.FixtureRequest, tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), **request.param)


def compare(folder: Path, height: int, width: int, steps: int, batch: int) -> None:
    """Both pipelines on the same latents; their largest difference is under 1/255."""
    ours = Pipeline.from_checkpoint(folder)
    theirs = diffusers.FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    guidance = 2.0 if ours.model.guidance_embeds else None
    requests = [
        ours.request(CAPTIONS[i % 2], i, steps, guidance, height, width) for i in range(batch)
    ]
    shape = flow.latent_shape(height, width, ours.model.latent_channels, ours.model.scale)
    noise = np.stack([flow.noise(i, shape) for i in range(batch)])
    expected = theirs(
        [request.prompt for request in requests],
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=2.0,
        latents=torch.from_numpy(flow.pack(noise)),
        max_sequence_length=ours.model.text_length,
        output_type="np",
    ).images
    images = np.stack(ours.generate(requests))
    assert images.shape == expected.shape
    assert images.std() > 5, "an empty image would equal another too easily"
    assert np.abs(images / 255 - expected).max() < 1 / 255
    assert np.abs(images - np.round(expected * 255)).max() <= 1


@pytest.mark.parametrize(
    ("height", "width", "steps", "batch"),
    [(32, 32, 3, 1), (32, 64, 1, 2), (48, 24, 7, 3), (16, 64, 28, 1)],
)
def test_images_are_those_of_diffusers(any_checkpoint, height, width, steps, batch):
    compare(any_checkpoint, height, width, steps, batch)


@pytest.mark.parametrize(("share", "steps", "batch"), [((1, 1), 4, 1), ((1, 2), 2, 2)])
def test_images_of_the_embedded_default_are_those_of_diffusers(checkpoint, share, steps, batch):
    from dermaflux.checkpoint import Checkpoint

    defaults = Checkpoint.open(checkpoint).defaults
    compare(checkpoint, defaults.height // share[0], defaults.width // share[1], steps, batch)


def test_mixed_steps_in_one_batch_are_within_rounding_of_singles(tiny_checkpoint):
    """torch on a CPU is not bit-equal over batch sizes; it is within one step of 255."""
    pipeline = Pipeline.from_checkpoint(tiny_checkpoint)
    requests = [pipeline.request(CAPTIONS[i % 2], i, steps=1 + i) for i in range(4)]
    together = pipeline.generate(requests)
    for request, image in zip(requests, together, strict=True):
        (alone,) = pipeline.generate([request])
        assert np.abs(image.astype(int) - alone.astype(int)).max() <= 1


def test_every_part_has_the_tensors_of_a_bundle(tiny_checkpoint):
    from dermaflux.engines import eager

    encoder = eager.load(tiny_checkpoint, "vae_encoder")
    decoder = eager.load(tiny_checkpoint, "vae_decoder")
    pixels = flow.noise(0, (2, 3, 32, 16)).clip(-1, 1)
    parameters = encoder.run({"sample": pixels})["latent_parameters"]
    assert parameters.shape == (2, 8, 8, 4)
    assert decoder.run({"latent_sample": parameters[:, :4]})["sample"].shape == pixels.shape
    found = eager.load(tiny_checkpoint, "classifier").run({"pixel_values": pixels[:, :, :16, :]
        .repeat(2, axis=2).repeat(2, axis=3)})  # fmt: skip
    assert found["logits"].shape == (2, 2)
    assert found["features"].shape == (2, 32)


def test_logits_are_the_head_over_the_features(tiny_checkpoint):
    from dermaflux.engines import parts

    module = parts.module(tiny_checkpoint, "classifier")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits, *_ = module(pixels)
    assert torch.allclose(logits, module.model(pixels), atol=1e-6)


def test_what_cannot_be_run_is_refused(tiny_checkpoint, tmp_path):
    from dermaflux.engines import eager

    with pytest.raises(EngineError, match="text_encoder of .* cannot be opened"):
        eager.load(tmp_path, "text_encoder")
    engine = eager.load(tiny_checkpoint, "vae_decoder")
    assert (engine.name, engine.precision) == (EAGER, "fp32")
    with pytest.raises(EngineError, match="takes"):
        engine.run({"sample": np.zeros((1, 4, 8, 8), np.float32)})


def test_precisions_are_near_each_other_and_named(tiny_checkpoint):
    from dermaflux.engines import eager

    noise = {"latent_sample": flow.noise(0, (2, 4, 8, 8))}
    plain = eager.load(tiny_checkpoint, "vae_decoder").run(noise)["sample"]
    for precision, bound in (("fp32", 1e-6), ("bf16", 0.1), ("fp8", 0.1)):
        engine = eager.load(tiny_checkpoint, "vae_decoder", precision=precision)
        # Only the transformer has layers in fp8; the decoder beside it is in bf16, and says so.
        assert engine.precision == {"fp8": "bf16"}.get(precision, precision)
        found = engine.run(noise)["sample"]
        assert found.dtype == np.float32
        assert np.abs(found - plain).max() <= bound * np.abs(plain).max()
    with pytest.raises(EngineError, match="no precision 'int4'; use fp32, bf16, fp16, fp8"):
        eager.load(tiny_checkpoint, "vae_decoder", precision="int4")


def test_the_reference_is_diffusers_own_forward_and_the_fast_one_is_asked_for(tiny_checkpoint):
    from dermaflux.engines import eager

    plain = eager.load(tiny_checkpoint, "transformer", precision="fp32")
    assert isinstance(plain, eager.EagerEngine)
    assert isinstance(plain.model.model, diffusers.FluxTransformer2DModel)
    for options in ({"fast": True}, {"compile": True}, {"precision": "fp8"}):
        engine = eager.load(tiny_checkpoint, "transformer", **options)
        assert isinstance(engine, eager.FluxEngine)
        assert (engine.name, engine.precision) == (EAGER, options.get("precision", "fp32"))
    decoder = eager.load(tiny_checkpoint, "vae_decoder", fast=True)
    assert isinstance(decoder, eager.EagerEngine)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_here_is_refused(tiny_checkpoint):
    with pytest.raises(EngineError, match="torch cannot use the device 'cuda'.*Use cpu"):
        Pipeline.from_checkpoint(tiny_checkpoint, device="cuda")


def test_a_bundle_runs_the_weights_of_a_checkpoint(tiny_bundle, tiny_checkpoint):
    pipeline = Pipeline.open(
        tiny_bundle, engine=EAGER, checkpoint=tiny_checkpoint, precision="bf16", device="cpu"
    )
    assert {engine.name for engine in pipeline.engines.values()} == {EAGER}
    record = pipeline.record(pipeline.request("benign lesion", seed=1))
    assert (record["engine"], record["precision"]) == (EAGER, "bf16")
