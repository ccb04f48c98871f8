"""Write the trained parts as one checkpoint folder, the one that diffusers and timm read.

The transformer and the autoencoder are stored in float16, half the size and far finer than what
was trained in bfloat16; diffusers runs them in float32 unless told otherwise. The text encoders
stay float32, since transformers would run them in the stored type beside a float32 transformer.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer

from dermaflux import files
from dermaflux import licence as licences
from training import data
from training.generator import Generator
from training.states import PRETRAINED
from training.words import save_clip, save_tokenizer

UNKNOWN: Final = licences.UNKNOWN.id

_MODEL_INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.30.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

# FLUX.1-dev's own resolution-dependent shift.
_SCHEDULER = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def licence(seen: Iterable[tuple[str, str]]) -> str:
    """The licence of weights from the (source, licence) pairs that they saw.

    Apache-2.0 where all of the data is open, its attribution standing with the ingredients; else
    all licences that are not (`A AND B`), for what they ask of the data is not ours to lift.
    """
    pairs = sorted(seen)
    for source, name in pairs:
        if not name.strip():
            return f"unknown: {source or 'the data'} states no licence"
    terms = licences.combined(licences.Ingredient(source, name) for source, name in pairs)
    return terms.licence or "Apache-2.0"


def ingredients(seen: Iterable[tuple[str, str]], used_for: str) -> list[dict[str, str]]:
    """What a part saw, for `provenance.json`: one entry per (source, licence)."""
    return [
        {"name": f"{source}, training split", "kind": "data", "licence": licence.strip() or UNKNOWN,
         "attribution": source, "used_for": used_for}
        for source, licence in seen
    ]  # fmt: skip


def kept_ingredients(folder: Path, used_for: str) -> list[dict[str, str]]:
    """The entries of a checkpoint's `provenance.json` that belong to the part `used_for`."""
    file = folder / "provenance.json"
    if not file.is_file():
        return []
    found: list[dict[str, str]] = json.loads(file.read_text()).get("ingredients", [])
    return [item for item in found if item.get("used_for") == used_for]


def add_classifier(
    folder: Path, seen: Sequence[tuple[str, str]], made_of: Sequence[Mapping[str, str]] = (),
    begun: str = "",
) -> None:  # fmt: skip
    """Name what the classifier in `folder/classifier` saw in `folder/provenance.json`, if any.

    `seen`, `made_of` and `begun` are those of its `states.History`: the (source, licence) pairs,
    entries of what is no plain data, and the name of the weights that it began with.
    """
    file = folder / "provenance.json"
    if not file.is_file():
        return
    provenance = json.loads(file.read_text())
    told = {(one["source"], one.get("licence", "")) for one in made_of if "source" in one}
    entries = [
        {"name": source.removesuffix(PRETRAINED), "kind": "weights", "licence": terms,
         "attribution": source.removesuffix(PRETRAINED)}
        for source, terms in seen
        if source.endswith(PRETRAINED) and (source, terms) not in told
    ] + [{k: v for k, v in one.items() if k != "source"} for one in made_of]  # fmt: skip
    plain = [pair for pair in seen if pair not in told and not pair[0].endswith(PRETRAINED)]
    stated = [(one["name"], one.get("licence", "")) for one in entries]
    weights = {"name": "classifier weights", "kind": "weights",
               "licence": licence([*plain, *stated]), "used_for": "classifier",
               "attribution": f"{'fine-tuned' if begun else 'trained'} from "
                              f"{begun or 'random weights'}"}  # fmt: skip
    others = [i for i in provenance.get("ingredients", []) if i.get("used_for") != "classifier"]
    provenance["ingredients"] = [
        *others, weights, *ingredients(plain, "classifier"),
        *({**one, "licence": one.get("licence", "").strip() or UNKNOWN, "used_for": "classifier"}
          for one in entries),
    ]  # fmt: skip
    files.write(file, (json.dumps(provenance, indent=2) + "\n").encode())


def trained(folder: Path) -> dict[str, Any]:
    """How the generator of a checkpoint was trained: `training` of its `provenance.json`.

    Raises:
        DatasetError: the checkpoint does not say, as only those of `training.mini` do.
    """
    file = folder / "provenance.json"
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))["training"]
        if isinstance(stated["architecture"], dict) and isinstance(stated["phases"], dict):
            return dict(stated)
        raise TypeError("training.architecture and training.phases are no objects")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise data.DatasetError(
            f"{file} does not say how the generator was trained ({type(error).__name__}: {error}); "
            "only checkpoints that python -m training.mini made can be reported on"
        ) from error


def write(
    folder: Path,
    generator: Generator,
    autoencoder: AutoencoderKL,
    clip: Tokenizer,
    t5: Tokenizer,
    provenance: Mapping[str, object],
    *,
    shard: str = "14MB",
) -> None:
    """Write a Flux checkpoint beside what `folder` already holds (`classifier/`, a report).

    Each part is written to a temporary folder first and then put in place of the old one.
    """
    length = int(generator.clip.config.max_position_embeddings)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".checkpoint-") as scratch:
        new = Path(scratch)
        half = torch.float16
        generator.transformer.to(half).save_pretrained(new / "transformer", max_shard_size=shard)
        autoencoder.to(half).save_pretrained(new / "vae", max_shard_size=shard)
        generator.transformer.to(torch.float32)
        autoencoder.to(torch.float32)
        save_clip(generator.clip, new / "text_encoder", shard)
        generator.t5.save_pretrained(new / "text_encoder_2", max_shard_size=shard)
        save_tokenizer(clip, new / "tokenizer", length)
        save_tokenizer(t5, new / "tokenizer_2", length)
        FlowMatchEulerDiscreteScheduler(**_SCHEDULER).save_pretrained(new / "scheduler")
        for name, content in (("model_index", _MODEL_INDEX), ("provenance", provenance)):
            (new / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
        for part in sorted(new.iterdir(), key=lambda path: path.name == "model_index.json"):
            old = folder / part.name
            if old.is_dir():
                shutil.rmtree(old)
            part.replace(old)
