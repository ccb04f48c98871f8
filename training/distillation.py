"""Does one forward of the distilled transformer give what its teacher's two give, guided?

The teacher is the first phase's average, saved by `training.generator` in the work folder; only
its text encoders are part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

from dermaflux import flow
from dermaflux.engines import parts
from dermaflux.pipeline import Pipeline
from training import data, generator, states
from training.figures import Figure, Floats, Pixels, interval, resampled

GOAL: Final = 0.5
WHAT: Final = "error of the distilled forward, over that of the undistilled one"
_BATCH = 16


def teacher_of(file: Path, checkpoint: Path, settings: Mapping[str, Any]) -> generator.Generator:
    """The generator of which `checkpoint` was distilled.

    `settings` is its architecture as `provenance.json` has it.

    Raises:
        DatasetError: the file is missing, no state, or of another training run.
    """
    if not file.is_file():
        raise data.DatasetError(f"{file} is missing")
    known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    with states.reading(file, f"{checkpoint} was made from another") as state:
        teacher = generator.Generator(generator.Architecture(**known))
        teacher.load_state_dict(state["average"])
    # Distilling leaves the text encoders as they were, so they tell whose teacher it is.
    for part, kind, mine in (
        ("text_encoder", CLIPTextModel, teacher.clip),
        ("text_encoder_2", T5EncoderModel, teacher.t5),
    ):
        shipped = kind.from_pretrained(checkpoint / part).state_dict()
        if not all(torch.equal(value, shipped[name]) for name, value in mine.state_dict().items()):
            raise data.DatasetError(f"{file} is of another training run than {checkpoint}")
    return teacher.eval().requires_grad_(False)


def tracking(
    pipeline: Pipeline, checkpoint: Path, teacher: generator.Generator, images: Pixels,
    captions: Sequence[str], default: float, levels: Sequence[float],
) -> Figure:  # fmt: skip
    """How far one forward of the distilled transformer is from the teacher's two, at guidances.

    Over held-out pictures [N, S, S, 3] with their captions, each at a random step of the default
    schedule. An error is the norm of the difference over that of the teacher's guided velocity.
    The figure, at the `default` guidance, is the error over that of the teacher's one forward with
    its text, which is what a model that knew no guidance would give; both errors stand beside for
    all `levels`, of which `default` is one.
    """
    parts = [
        _errors(pipeline, checkpoint, teacher, images[rows], captions[rows], levels, rows.start)
        for rows in (slice(s, s + _BATCH) for s in range(0, len(images), _BATCH))
    ]
    errors = {w: np.concatenate([part[w] for part in parts], axis=1) for w in levels}
    mine, plain = errors[default]
    counts = resampled(len(mine), np.random.default_rng(0))
    return Figure(
        "distilled",
        f"{WHAT}, at guidance {default:g}",
        float(mine.mean() / plain.mean()),
        len(mine),
        interval((counts @ mine) / (counts @ plain)),
        GOAL,
        "at most",
        {
            f"{name} error at {level:g}": float(values.mean())
            for level in levels
            for name, values in zip(("distilled", "undistilled"), errors[level], strict=True)
        },
    )


@torch.no_grad()
def _errors(pipeline: Pipeline, checkpoint: Path, teacher: generator.Generator, images: Pixels,
            captions: Sequence[str], levels: Sequence[float],
            seed: int) -> dict[float, Floats]:  # fmt: skip
    """Relative errors [2, N] of the distilled and of the undistilled forward at every guidance."""
    spec, random, count = pipeline.model, np.random.default_rng(seed), len(images)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    mean = parts.module(checkpoint, "vae_encoder")(pixels)[0].chunk(2, dim=1)[0]
    latents = ((mean - spec.shift_factor) * spec.scaling_factor).numpy()
    clean = torch.from_numpy(flow.pack(latents))
    positions = torch.from_numpy(flow.image_ids(*latents.shape[2:]))
    steps = pipeline.schedule.sigmas(pipeline.defaults.steps, clean.shape[1])[:-1]
    sigma = torch.from_numpy(random.choice(steps, count))
    noise = torch.from_numpy(random.standard_normal(clean.shape, dtype=np.float32))
    noisy = torch.lerp(clean, noise, sigma[:, None, None])
    names = ("tokenizer", "tokenizer_2")
    ids = [torch.from_numpy(pipeline.tokenizers[n].ids([*captions, ""])) for n in names]
    hidden, pooled = teacher.encode(*ids)
    text, empty = (hidden[:-1], pooled[:-1]), (hidden[-1:], pooled[-1:])
    student = parts.module(checkpoint, "transformer")

    def wanted(level: float) -> Tensor:
        weight = torch.full((count,), level)
        return generator.guided(teacher, *text, noisy, sigma, weight, positions, empty)

    def given(level: float) -> Tensor:
        zeros = torch.zeros(hidden.shape[1], 3)
        weight = torch.full((count,), level)
        velocity: Tensor = student(noisy, *text, sigma, positions, zeros, weight)[0]
        return velocity

    plain = wanted(1.0)  # guidance of 1 is the text alone
    return {
        level: np.stack([_relative(given(level), wanted(level)), _relative(plain, wanted(level))])
        for level in levels
    }


def _relative(given: Tensor, wanted: Tensor) -> Floats:
    error = (given - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    return np.asarray(error.double().numpy())
