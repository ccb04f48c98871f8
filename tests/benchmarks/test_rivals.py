from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks.rivals import flux_optimum, flux_torch, sessions, vit_torch
from benchmarks.rivals.task import Task
from dermaflux import flow
from dermaflux.bundle import Bundle
from dermaflux.checkpoint import Checkpoint
from dermaflux.classifier import Classifier, Prepared
from dermaflux.engines import ORT
from dermaflux.errors import DermaFluxError, EngineError
from dermaflux.golden import psnr
from dermaflux.pipeline import Pipeline

FAKE = """
import json, sys
import numpy as np
print(json.dumps({"opened_s": 1.5, "versions": {"optimum": "0"}}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    noise = np.load(asked["latents"])
    if asked["steps"] == 2:
        print(json.dumps({"error": "RuntimeError: two steps"}), flush=True)
    elif asked["steps"] == 3:
        print("last words", file=sys.stderr)
        break
    else:
        np.save(asked["out"], np.full((len(noise), asked["height"], asked["width"], 3), 7, "u1"))
        print(json.dumps({"seconds": 0.25, "stages": {"denoise": 0.2}}), flush=True)
"""

OPTIMUM = """
import numpy as np
from PIL import Image
class Vae:
    def decode(self, latents):
        return latents
class ORTFluxPipeline:
    def __init__(self):
        self.vae = Vae()
    @classmethod
    def from_pretrained(cls, folder, provider, session_options):
        print("chatter on stdout")
        assert session_options.intra_op_num_threads == 1
        return cls()
    def set_progress_bar_config(self, disable):
        pass
    def encode_prompt(self):
        pass
    def __call__(self, prompts, height, width, num_inference_steps, latents, max_sequence_length,
                 guidance_scale):
        if num_inference_steps == 2:
            raise RuntimeError("two steps")
        self.encode_prompt()
        self.vae.decode(latents)
        value = int(float(latents.sum()) * 0 + max_sequence_length)
        images = [Image.new("RGB", (width, height), (value,) * 3) for _ in prompts]
        return type("Output", (), {"images": images})
"""


@pytest.fixture(scope="module")
def task(tiny_checkpoint: Path) -> Task:
    return Task.of(Checkpoint.open(tiny_checkpoint))


def test_a_task_is_the_bundles_and_its_noise_the_seeds(tiny_bundle: Bundle) -> None:
    task = Task.of(tiny_bundle)
    asked = task.asked(3, images=2)
    assert asked.text_length == tiny_bundle.model.text_length == 16
    assert asked.seeds == (6, 7)
    assert np.array_equal(asked.noise[1], flow.noise(7, task.shape))
    assert len(set(asked.prompts)) == 2
    assert task.asked(3, 2).prompts == asked.prompts
    assert task.told()["max_sequence_length"] == 16


@pytest.mark.parametrize("steps", [0, 21])
def test_steps_that_the_bundle_does_not_take_are_refused(tiny_bundle: Bundle, steps: int) -> None:
    with pytest.raises(DermaFluxError, match="use 1 to 20"):
        Task.of(tiny_bundle, steps)


def test_a_task_of_another_size_has_noise_of_that_size(tiny_bundle: Bundle) -> None:
    task = Task.of(tiny_bundle).at(steps=1, side=32)
    assert task.asked(0).noise.shape == (1, 4, 4, 4)
    assert (task.asked(0).height, task.steps) == (32, 1)


def test_diffusers_draws_our_pictures_one_or_several(tiny_checkpoint: Path, task: Task) -> None:
    rival = flux_torch.eager(tiny_checkpoint, threads=1)
    ours = Pipeline.from_checkpoint(tiny_checkpoint, threads=1)
    for images in (1, 2):
        asked = task.asked(1, images)
        drawn = rival.draw(asked)
        pictures = ours.generate(
            [
                ours.request(prompt, seed, asked.steps, asked.guidance, asked.height, asked.width)
                for prompt, seed in zip(asked.prompts, asked.seeds, strict=True)
            ]
        )
        assert drawn.pixels.shape == (images, 32, 32, 3)
        assert all(psnr(a, b) > 50 for a, b in zip(drawn.pixels, pictures, strict=True))
        assert set(drawn.stages) == {"text", "denoise", "decode", "png"}
        assert min(drawn.stages.values()) > 0
    assert rival.evidence()["transformer_dtype"] == "torch.float32"


def test_compiled_diffusers_is_compiled_and_draws_the_same(
    tiny_checkpoint: Path, task: Task
) -> None:
    eager = flux_torch.eager(tiny_checkpoint, threads=1)
    compiled = flux_torch.compiled(tiny_checkpoint, 1, task.asked(0), backend="eager")
    asked = task.asked(1)
    assert psnr(compiled.draw(asked).pixels[0], eager.draw(asked).pixels[0]) > 50
    found = compiled.evidence()
    assert found["graphs"] >= 2
    assert found["graph_breaks"] == found["recompiled_while_measured"] == 0


@pytest.mark.parametrize("opened", [flux_torch.eager, vit_torch.eager])
def test_emulated_bf16_is_refused(
    opened, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (flux_torch, vit_torch):
        monkeypatch.setattr(module, "instructions", lambda: ("avx2",))
    with pytest.raises(EngineError, match="emulated"):
        opened(tiny_checkpoint, 1, "bfloat16")


def test_what_is_no_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="diffusers cannot open"):
        flux_torch.eager(tmp_path, 1)
    with pytest.raises(EngineError, match="timm cannot open"):
        vit_torch.eager(tmp_path, 1)


def test_optimum_is_asked_over_a_pipe(tiny_bundle: Bundle) -> None:
    task = Task.of(tiny_bundle)
    with flux_optimum.opened(tiny_bundle.path, 1, [sys.executable, "-c", FAKE]) as rival:
        assert rival.opened_s == 1.5
        assert rival.evidence() == {"versions": {"optimum": "0"}}
        drawn = rival.draw(task.asked(0, images=2))
        assert drawn.pixels.shape == (2, 64, 64, 3)
        assert drawn.seconds == 0.25
        with pytest.raises(EngineError, match="two steps"):
            rival.draw(task.at(steps=2).asked(0))
        assert rival.draw(task.asked(1)).seconds == 0.25, "an error ends nothing"
        with pytest.raises(EngineError, match="last words"):
            rival.draw(task.at(steps=3).asked(0))


def test_without_optimums_environment_the_command_that_makes_it_is_named(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flux_optimum, "ENVIRONMENT", tmp_path / ".venv-optimum")
    with (
        pytest.raises(EngineError, match="make .*venv-optimum/.complete"),
        flux_optimum.opened(tiny_bundle.path, 1),
    ):
        pass


def test_the_other_end_of_the_pipe(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for Optimum, whose chatter on stdout must not become an answer."""
    (tmp_path / "optimum").mkdir()
    (tmp_path / "optimum/onnxruntime.py").write_text(OPTIMUM)
    for name in ("optimum", "optimum-onnx"):
        folder = tmp_path / f"{name.replace('-', '_')}-9.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    script = Path(flux_optimum.__file__).with_name("optimum_process.py")
    task = Task.of(tiny_bundle)
    with flux_optimum.opened(tiny_bundle.path, 1, [sys.executable, str(script)]) as rival:
        assert rival.evidence()["versions"]["optimum-onnx"] == "9"
        with pytest.raises(EngineError, match="RuntimeError: two steps"):
            rival.draw(task.at(steps=2).asked(0))
        drawn = rival.draw(task.asked(0, images=2))
        assert (drawn.pixels == 16).all(), "it is given the bundle's text length"
        assert drawn.seconds is not None
        assert sum(drawn.stages.values()) == pytest.approx(drawn.seconds)


def test_plain_sessions_draw_our_pictures(tiny_bundle: Bundle) -> None:
    plain = sessions.pipeline_of(tiny_bundle, 1)
    ours = Pipeline.open(tiny_bundle, engine=ORT, precision="fp32", threads=1)
    requests = [ours.request("nevus", seed) for seed in (1, 2)]
    for a, b in zip(plain.generate(requests), ours.generate(requests), strict=True):
        assert psnr(a, b) > 60


def test_a_plain_session_judges_as_ours_with_logits_alone(tiny_bundle: Bundle) -> None:
    pixels = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    ours = Classifier.open(tiny_bundle, ORT, "fp32", threads=1, gated=False)
    expected = [one.prediction.logits for one in ours.judge([Prepared(one) for one in pixels])]
    assert np.allclose(sessions.classifier_of(tiny_bundle, 1)(pixels), expected, atol=1e-6)
    graph = tiny_bundle.file(tiny_bundle.parts["classifier"].files["fp32"].path)
    cut = onnx.load_from_string(sessions.logits_alone(graph))
    assert [one.name for one in cut.graph.output] == ["logits"]


def test_timm_judges_as_the_eager_engine(tiny_checkpoint: Path) -> None:
    from dermaflux.engines import eager

    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    expected = eager.load(tiny_checkpoint, "classifier").run({"pixel_values": pixels})["logits"]
    assert np.allclose(vit_torch.eager(tiny_checkpoint, 1).judge(pixels), expected, atol=1e-5)
    compiled = vit_torch.compiled(tiny_checkpoint, 1, pixels, backend="eager")
    assert np.allclose(compiled.judge(pixels), expected, atol=1e-5)
    assert compiled.evidence()["graphs"] == 1
