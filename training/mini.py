"""The recipe of the embedded default: a small real Flux pipeline from real lesion images.

    python -m training.mini --data DATASET --out models/mini
    python -m training.vit --data DATASET --data OTHER --out models/mini/classifier

The first runs every stage that is not done yet and assembles the checkpoint: latents, generator,
distillation, autoencoder, folder. State lives in `--work` (default `runs/mini`): kill it and run it
again. `--stage` runs one stage alone; `--report` measures what was made (`training.report`), with a
classifier of real images as its judge.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch.multiprocessing.spawn import spawn

from dermaflux import files
from dermaflux.command import ended
from dermaflux.prompt import WORDING, Lesion, caption
from training import autoencoder, checkpoint, data, generator, latents, report, states
from training.drawing import fingerprint
from training.words import train_tokenizer

log = logging.getLogger(__name__)

SIZE = 128  # pixels a side
STAGES = ("all", "generator", "autoencoder", "assemble")
STEPS, GUIDANCE = 20, 3.0
VARIANTS = 24
_RARE = {"black": 1.5, "blue gray": 1.0, "dark brown": 0.5}
_FOREIGN = 0.01  # found by looking: above it, 126 of 2,117 pictures, nearly all with patches or ink


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


def foreign_colour(image: NDArray[np.uint8], mask: NDArray[np.bool_] | None) -> float:
    """Share of [H, W, 3] that is green, blue or violet outside of the lesion: a patch or ink."""
    hue, saturation, value = np.moveaxis(np.asarray(Image.fromarray(image).convert("HSV")), -1, 0)
    # PIL's hue runs to 255: 60 to 300 degrees. Skin, blood and pigment stay outside of them.
    foreign = (hue > 42) & (hue < 213) & (saturation > 64) & (value > 76)
    return float(np.mean(foreign if mask is None else foreign & ~mask))


def draw_weight(sample: data.Sample, image: NDArray[np.uint8]) -> float:
    """How often a lesion is drawn: malignant ones and rare colours more, for they are few.

    Pictures with coloured patches or ink marks are drawn a tenth as often: beside lesions that were
    photographed with them, the model would draw them too.
    """
    lesion = sample.lesion
    rare = sum(weight for colour, weight in _RARE.items() if colour in lesion.colors)
    weight = 1.0 + (1.0 if lesion.label == "malignant" else 0.0) + rare
    mask = data.load_mask(sample, image.shape[0])
    return weight * (0.1 if foreign_colour(image, mask) > _FOREIGN else 1.0)


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
        weights=torch.tensor(
            [draw_weight(s, i) for s, i in zip(prepared.samples, prepared.images, strict=True)]
        ),
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
    for name in ("generator", "distilled"):
        if (file := work / f"{name}.pt").is_file():
            # Here and not only in the processes, of which an error comes back with a traceback.
            with states.reading(file, generator.RESUME) as state:
                _ = [state[key] for key in ("model", "average", "optimizers", "step", "seconds")]
    arguments = (seen, architecture, plan, work)
    if plan.processes > 1:
        spawn(_generator_stages, arguments, nprocs=plan.processes)
    else:
        _generator_stages(0, *arguments)


def finished(
    prepared: Prepared, architecture: generator.Architecture, plan: generator.Schedule,
    drawing: autoencoder.Plan, work: Path, out: Path,
) -> dict[str, object]:  # fmt: skip
    """Assemble the checkpoint from the saved stages; returns its provenance.

    Raises:
        DatasetError: a stage has not been trained yet.
    """
    model = generator.Generator(architecture)
    phases = {}
    for phase, name in (("first", "generator"), ("distilled", "distilled")):
        if not (work / f"{name}.pt").is_file():
            raise data.DatasetError(f"{work}/{name}.pt is missing: train it without --stage first")
        with states.reading(work / f"{name}.pt", generator.RESUME) as state:
            target = model if phase == "first" else model.transformer
            target.load_state_dict(state["average"])
            phases[phase] = {
                "steps": state["step"],
                "seconds": round(state["seconds"]),
                "loss": round(float(np.mean(state["losses"][-200:])), 4),
            }
    seen = data.licences(prepared.samples)
    vae = autoencoder.train(prepared.images, prepared.basis, drawing, work / "autoencoder.pt")
    provenance: dict[str, object] = {
        "name": "mini",
        "base": None,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "wording": WORDING,
        "defaults": {"steps": STEPS, "guidance": GUIDANCE, "height": SIZE, "width": SIZE,
                     "text_length": architecture.text_length},
        "licence": checkpoint.licence(seen),
        "ingredients": [
            *checkpoint.ingredients(seen, "generator, autoencoder"),
            *checkpoint.kept_ingredients(out, "classifier"),
        ],
        "training": {
            "recipe": "training.mini",
            "architecture": dataclasses.asdict(architecture),
            "schedule": dataclasses.asdict(plan),
            "autoencoder": dataclasses.asdict(drawing),
            "phases": phases,
        },
    }  # fmt: skip
    checkpoint.write(out, model, vae, prepared.clip, prepared.t5, provenance)
    return provenance


SHEET = (
    Lesion("benign", "nevus", "symmetric", "regular", ("light brown",), "small"),
    Lesion("benign", "nevus", "symmetric", "regular", ("light brown", "dark brown"), "medium",
           ("pigment network",)),
    Lesion("benign", "seborrheic keratosis", "slightly asymmetric", "irregular",
           ("light brown",), "large", ("milia-like cysts",)),
    Lesion("malignant", "melanoma", "asymmetric", "irregular", ("light brown", "dark brown"),
           "medium"),
    Lesion("malignant", "melanoma", "asymmetric", "irregular", ("dark brown", "black"), "large"),
    Lesion("malignant", "melanoma", None, None, ("light brown", "reddish"), "edge"),
)  # fmt: skip
"""The contact sheet's rows; its columns are seeds 0, 1, 2, ..., not chosen by hand."""


def draw_sheet(folder: Path, file: Path, columns: int = 8) -> None:
    """Sample the finished checkpoint in plain diffusers and save the contact sheet as PNG."""
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    sheet = Image.new("RGB", (columns * (SIZE + 4), len(SHEET) * (SIZE + 4)), "white")
    for row, lesion in enumerate(SHEET):
        images = pipeline(
            [caption(lesion)] * columns, height=SIZE, width=SIZE, num_inference_steps=STEPS,
            guidance_scale=GUIDANCE, max_sequence_length=pipeline.tokenizer.model_max_length,
            generator=[torch.Generator().manual_seed(seed) for seed in range(columns)],
        ).images  # fmt: skip
        for column, image in enumerate(images):
            sheet.paste(image, (column * (SIZE + 4) + 2, row * (SIZE + 4) + 2))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, optimize=True)


def evaluate(prepared: Prepared, folder: Path, out: Path) -> dict[str, object]:
    """Reconstruction of held-out pictures by the shipped autoencoder, mean PSNR in dB; of none,
    where the dataset has no test split."""
    held = [sample for sample in data.read(folder) if sample.split == "test"]
    if not held:
        return {"test_images": 0}
    vae = AutoencoderKL.from_pretrained(out / "vae").eval()
    images = data.load_images(held, SIZE)
    linear = np.clip(prepared.basis.decode(prepared.basis.encode(images)), -1, 1)
    error = np.square(linear - (images.astype(np.float32) / 127.5 - 1)).mean(axis=(1, 2, 3))
    figures = {
        "encode_decode": autoencoder.psnr(vae, images, encode=True, basis=prepared.basis),
        "decode_exact_latents": autoencoder.psnr(vae, images, encode=False, basis=prepared.basis),
        "linear_ceiling": float(np.mean(10 * np.log10(4 / error))),
    }
    return {
        "test_images": len(images),
        "psnr_db": {name: round(value, 2) for name, value in figures.items()},
    }


def _known(prepared: Prepared, folder: Path, out: Path) -> dict[str, object]:
    """`evaluate`, and how the generator was trained."""
    phases = checkpoint.trained(out)["phases"]
    return {**evaluate(prepared, folder, out), "generator": phases}


def write_figures(figures: Mapping[str, object], out: Path) -> None:
    """Write the checkpoint's `report.json`; an earlier report of the same weights is kept in it."""
    weights = fingerprint(out)
    before = report.earlier(out)
    kept = before if before.get("weights") == weights else {}
    document = {**kept, **figures, "weights": weights}
    files.write(out / "report.json", (json.dumps(document, indent=2) + "\n").encode())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.mini", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--data", type=Path, required=True, help="dataset folder (ISIC 2017)")
    parser.add_argument("--out", type=Path, default=Path("models/mini"))
    parser.add_argument("--work", type=Path, default=Path("runs/mini"), help="state to resume from")
    parser.add_argument("--sheet", type=Path, default=Path("docs/mini_samples.png"))
    parser.add_argument("--stage", choices=STAGES, default="all")
    parser.add_argument("--hours", type=data.positive, default=generator.Schedule.hours)
    parser.add_argument(
        "--distill-hours", type=data.positive, default=generator.Schedule.distill_hours
    )
    parser.add_argument("--autoencoder-hours", type=data.positive, default=autoencoder.Plan.hours)
    parser.add_argument("--batch", type=data.count, default=generator.Schedule.batch)
    parser.add_argument("--optimizer", choices=generator.OPTIMIZERS, default=generator.MUON,
                        help="adamw where bfloat16, in which Muon computes, is slow")  # fmt: skip
    parser.add_argument("--processes", type=data.count, default=generator.Schedule.processes)
    parser.add_argument("--report", action="store_true", help="measure --out, train nothing")
    parser.add_argument("--judge", type=Path, default=Path("runs/mini/judge"),
                        help="classifier trained on the same dataset alone")  # fmt: skip
    parser.add_argument("--first", type=Path, help="older checkpoint to stand beside")
    parser.add_argument("--samples", type=int, default=report.Plan.samples,
                        help="pairs per attribute; all counts follow")  # fmt: skip
    parser.add_argument("--table", type=Path, default=Path("docs/mini_report.md"))
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    architecture = generator.Architecture()
    plan = generator.Schedule(
        hours=options.hours, distill_hours=options.distill_hours, processes=options.processes,
        batch=options.batch, optimizer=options.optimizer,
    )  # fmt: skip
    drawing = autoencoder.Plan(hours=options.autoencoder_hours)

    def work() -> None:
        options.work.mkdir(parents=True, exist_ok=True)
        prepared = prepare(options.data, architecture)
        if options.report:
            asked = report.Plan(options.data, options.out, options.judge, options.work,
                                options.first, options.samples)  # fmt: skip
            text = report.make(asked, _known(prepared, options.data, options.out))
            options.table.parent.mkdir(parents=True, exist_ok=True)
            files.write(options.table, text.encode())
            draw_sheet(options.out, options.sheet)
            print(text)
            return
        if options.stage in ("all", "generator"):
            train_generator(corpus(prepared), architecture, plan, options.work)
        if options.stage == "autoencoder":
            autoencoder.train(
                prepared.images, prepared.basis, drawing, options.work / "autoencoder.pt"
            )
        if options.stage in ("all", "assemble"):
            finished(prepared, architecture, plan, drawing, options.work, options.out)
            figures = _known(prepared, options.data, options.out)
            draw_sheet(options.out, options.sheet)
            write_figures(figures, options.out)
            print(json.dumps({"out": str(options.out), **figures}))

    return ended(work, "stopped; the same command goes on from the last saved state")


if __name__ == "__main__":
    sys.exit(main())
