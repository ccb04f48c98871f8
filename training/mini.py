"""The recipe of the embedded default: a small real Flux pipeline from real lesion images.

    python -m training.mini --data ../shared/data/isic2017 --out models/mini

runs every stage that is not done yet and assembles the checkpoint: latents, generator, distillation,
autoencoder, folder. State lives in `--work` (default `runs/mini`); kill it and run it again.
`--stage` runs one stage alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dermaflux.errors import DermaFluxError
from dermaflux.prompt import Lesion, caption
from training import data, generator, latents
from training.words import train_tokenizer

log = logging.getLogger(__name__)

SIZE = 128
VARIANTS = 24
_RARE = {"black": 1.5, "blue gray": 1.0, "dark brown": 0.5}


@dataclass(frozen=True)
class Prepared:
    """What every stage starts from."""

    basis: latents.Basis
    images: NDArray[np.uint8]
    samples: list[data.Sample]
    clip: Tokenizer
    t5: Tokenizer


def caption_variants(lesion: Lesion, count: int, random: np.random.Generator) -> list[str]:
    """`count` captions of one lesion: the whole one half the time, else with attributes left out.

    People ask for "a small malignant lesion" and no more; a model that has only seen full captions
    answers such prompts badly.
    """
    optional = [
        field.name
        for field in dataclasses.fields(Lesion)
        if field.name != "label" and getattr(lesion, field.name)
    ]
    empty = {name: () if name in ("colors", "structures") else None for name in optional}
    texts = []
    for _ in range(count):
        keep = 1.0 if random.random() < 0.5 else random.random()
        dropped = {name: empty[name] for name in optional if random.random() >= keep}
        texts.append(caption(dataclasses.replace(lesion, **dropped)))  # type: ignore[arg-type]
    return texts


def draw_weight(lesion: Lesion) -> float:
    """How often a lesion is drawn: malignant ones and rare colours more, for they are few."""
    rare = sum(weight for colour, weight in _RARE.items() if colour in lesion.colors)
    return 1.0 + (1.0 if lesion.label == "malignant" else 0.0) + rare


def prepare(folder: Path, architecture: generator.Architecture) -> Prepared:
    """Read the training split, fit the latent space, train the tokenizers."""
    samples = data.read(folder, "train")
    images = data.load_images(samples, SIZE)
    captions = [caption(sample.lesion) for sample in samples]
    clip, t5 = (
        train_tokenizer(
            captions,
            length=architecture.text_length,
            vocabulary=architecture.vocabulary,
            begin=begin,
        )
        for begin in (True, False)
    )
    return Prepared(latents.fit(images), images, samples, clip, t5)


def pack(latent: NDArray[np.float32]) -> NDArray[np.float32]:
    """[N, C, h, w] -> [N, h/2 w/2, 4C], as diffusers' FluxPipeline packs."""
    n, c, h, w = latent.shape
    return (
        latent.reshape(n, c, h // 2, 2, w // 2, 2)
        .transpose(0, 2, 4, 1, 3, 5)
        .reshape(n, h * w // 4, 4 * c)
    )


def corpus(prepared: Prepared) -> generator.Corpus:
    """Encode every picture in its eight orientations and tokenize its captions."""
    random = np.random.default_rng(0)
    turned = [
        torch.from_numpy(pack(prepared.basis.encode(images))).half()
        for images in latents.orientations(prepared.images)
    ]
    side = SIZE // 16
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
    texts = [caption_variants(sample.lesion, VARIANTS, random) for sample in prepared.samples]
    return generator.Corpus(
        latents=torch.stack(turned, dim=1),
        ids=ids,
        texts=generator.Texts.of(texts, prepared.clip, prepared.t5),
        weights=torch.tensor([draw_weight(sample.lesion) for sample in prepared.samples]),
    )


def _generator_stages(
    rank: int, seen: generator.Corpus, architecture: generator.Architecture,
    plan: generator.Schedule, work: Path,
) -> None:  # fmt: skip
    """Both phases of the generator in one of `plan.processes` processes."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    if plan.processes > 1:
        torch.set_num_threads(1)
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
        torch.distributed.init_process_group(
            "gloo", f"file://{(work / 'rendezvous').resolve()}", rank=rank,
            world_size=plan.processes,
        )  # fmt: skip
    teacher = generator.train(seen, architecture, plan, work)
    generator.distil(teacher, seen, architecture, plan, work)


def train_generator(
    seen: generator.Corpus, architecture: generator.Architecture, plan: generator.Schedule,
    work: Path,
) -> None:  # fmt: skip
    """Run the generator's phases to the end of their hours, on all processes."""
    (work / "rendezvous").unlink(missing_ok=True)
    arguments = (seen, architecture, plan, work)
    if plan.processes > 1:
        torch.multiprocessing.spawn(_generator_stages, arguments, nprocs=plan.processes)
    else:
        _generator_stages(0, *arguments)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.mini", description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/mini"))
    parser.add_argument("--hours", type=float, default=1.5)
    parser.add_argument("--distill-hours", type=float, default=0.2)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    options.work.mkdir(parents=True, exist_ok=True)
    architecture = generator.Architecture()
    plan = generator.Schedule(hours=options.hours, distill_hours=options.distill_hours)
    prepared = prepare(options.data, architecture)
    seen = corpus(prepared)
    log.info("latents %s, captions %s", tuple(seen.latents.shape), tuple(seen.texts.clip.shape))
    train_generator(seen, architecture, plan, options.work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
