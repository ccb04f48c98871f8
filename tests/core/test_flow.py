"""The arithmetic of Flux: properties, and equality with diffusers to the last bit."""

from __future__ import annotations

import numpy as np
import pytest

from dermaflux import flow
from dermaflux.errors import BundleError
from dermaflux.flow import Schedule

SHAPES = [(1, 16, 16, 16), (3, 4, 2, 8), (2, 16, 6, 10)]
CONFIGS = [
    {},
    {"shift": 3.0},
    {"use_dynamic_shifting": True},
    {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    {"use_dynamic_shifting": True, "base_shift": 0.3, "max_shift": 0.9, "base_image_seq_len": 64},
    {"shift": 2.0, "shift_terminal": 0.1},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_then_unpacked_is_the_identity(shape):
    latents = flow.noise(0, shape)
    tokens = flow.pack(latents)
    assert tokens.shape == (shape[0], shape[2] * shape[3] // 4, 4 * shape[1])
    assert np.array_equal(flow.unpack(tokens, *shape[2:]), latents)


@pytest.mark.parametrize("shape", SHAPES)
def test_packing_and_ids_are_those_of_diffusers(shape):
    torch = pytest.importorskip("torch")
    pipeline = pytest.importorskip("diffusers").FluxPipeline
    latents = flow.noise(0, shape)
    theirs = pipeline._pack_latents(torch.from_numpy(latents), *shape)
    assert np.array_equal(flow.pack(latents), theirs.numpy())
    ids = pipeline._prepare_latent_image_ids(1, shape[2] // 2, shape[3] // 2, "cpu", torch.float32)
    assert np.array_equal(flow.image_ids(*shape[2:]), ids.numpy())


def test_latents_cover_whole_tokens_only():
    assert flow.latent_shape(128, 64, 16, 8) == (16, 16, 8)
    assert flow.latent_shape(127, 65, 16, 8) == (16, 14, 8)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("tokens", [16, 64, 4096])
def test_schedule_is_that_of_diffusers(config, tokens):
    pytest.importorskip("diffusers")
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    theirs = FlowMatchEulerDiscreteScheduler(**config)
    ours = Schedule.from_config(dict(theirs.config))
    mu = calculate_shift(
        tokens,
        theirs.config.base_image_seq_len,
        theirs.config.max_image_seq_len,
        theirs.config.base_shift,
        theirs.config.max_shift,
    )
    # One step cannot start at 1 and end at a terminal share: diffusers gives not-a-number there.
    for steps in (2, 3, 4, 7, 20, 28, 50) + (() if "shift_terminal" in config else (1,)):
        theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        sigmas = ours.sigmas(steps, tokens)
        assert sigmas.dtype == np.float32
        assert np.array_equal(sigmas, theirs.sigmas.numpy())
        assert np.array_equal(ours.timesteps(sigmas[:-1]), (theirs.timesteps / 1000).numpy())


@pytest.mark.parametrize("config", CONFIGS[:-1])
def test_sigmas_fall_from_one_to_zero(config):
    for steps in (1, 2, 20):
        sigmas = Schedule(**config).sigmas(steps, 64)
        assert len(sigmas) == steps + 1
        assert sigmas[0] == pytest.approx(1.0)
        assert sigmas[-1] == 0.0
        assert np.all(np.diff(sigmas) < 0)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_karras_sigmas", True),
        ("use_beta_sigmas", True),
        ("use_exponential_sigmas", True),
        ("invert_sigmas", True),
        ("stochastic_sampling", True),
        ("an_option_of_tomorrow", 3),
        ("time_shift_type", "quadratic"),
        ("_class_name", "DDIMScheduler"),
    ],
)
def test_a_schedule_that_we_do_not_compute_is_refused_by_name(option, value):
    with pytest.raises(BundleError, match=str(value) if option == "_class_name" else option):
        Schedule.from_config({option: value})


def test_options_that_are_off_are_no_matter():
    config = {"use_karras_sigmas": False, "an_option_of_tomorrow": None, "shift": 2.0}
    assert Schedule.from_config(config) == Schedule(shift=2.0)


def test_noise_depends_on_its_seed_alone():
    shape = (16, 16, 16)
    assert np.array_equal(flow.noise(7, shape), flow.noise(7, shape))
    seeds = [0, 1, 2, 7, 2**32, 2**52, flow.MAX_SEED]
    drawn = [flow.noise(seed, shape) for seed in seeds]
    for index, one in enumerate(drawn):
        for other in drawn[index + 1 :]:
            assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.1


def test_noise_is_standard_normal():
    values = flow.noise(3, (16, 128, 128)).astype(np.float64)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert abs((values**3).mean()) < 0.02
    assert abs((values**4).mean() - 3) < 0.05


def test_noise_stays_the_same_over_versions():
    """Seeds in people's records must go on to mean the same image."""
    expected = [-0.14712793, 0.50211215, -1.09110105]
    assert flow.noise(7, (3,)).tolist() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("seed", [-1, 2**53])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(ValueError, match="out of range"):
        flow.noise(seed, (4,))


def test_a_step_moves_every_item_by_its_own_sigmas():
    latents, velocity = flow.noise(1, (3, 5, 4)), flow.noise(2, (3, 5, 4))
    sigma = np.array([1.0, 0.5, 0.25], dtype=np.float32)
    after = np.array([0.5, 0.25, 0.0], dtype=np.float32)
    moved = flow.euler_step(latents, velocity, sigma, after)
    assert moved.dtype == np.float32
    for i in range(3):
        alone = flow.euler_step(
            latents[i : i + 1], velocity[i : i + 1], sigma[i : i + 1], after[i : i + 1]
        )
        assert np.array_equal(moved[i : i + 1], alone)
