"""The keys of an adapter's file: which layers it has, and what stands there that is no plain LoRA.

Names, shapes and types are checked from the file's header, before any number is read.

    >>> found = sources(TensorFile.open(Path("flux_lora_64_64.safetensors")))
    >>> found["lora_unet_single_blocks_0_linear2"].rank
    64
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from training import kohya
from training.factors import AdapterError
from training.tensors import TensorFile

_KEY: Final = re.compile(
    r"(?P<name>.+?)\.(?:(?P<down>lora_A(?:\.default)?|lora_down)\.weight"
    r"|(?P<up>lora_B(?:\.default)?|lora_up)\.weight|(?P<alpha>alpha))"
)
# What stands in files that are no plain LoRA, and what to do about it.
_REFUSED: Final[Mapping[str, str]] = {
    r"dora_scale|lora_magnitude_vector": "DoRA scales each column of the merged weight, which no "
    "low-rank term does; train without DoRA",
    r"\.lokr_|\.hada_|\.oft_|\.boft_|\.ia3_|\.lora_mid": "it is a LyCORIS adapter of another kind "
    "(LoKr, LoHa, OFT, CP); train a plain LoRA, or extract one from the merged model",
    r"\.diff(_b)?$|\.set_weight$|\.reshape_weight$|_norm\.scale$": "it replaces biases or norms "
    "beside its low-rank factors; train with the layers' weights alone",
    r"lora_[AB]\.bias$": "it trained biases too; train with lora_bias off",
    r"processor\.|^base_model\.|^diffusion_model\.|^lora_transformer_": "it is another trainer's "
    "layout; convert it with diffusers: save FluxPipeline.lora_state_dict(FILE) with safetensors",
}

PARTS: Final = ("transformer", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Source:
    """The keys of one layer or module in a file."""

    name: str
    down: str
    up: str
    alpha: str | None
    rank: int
    rows: int


def sources(file: TensorFile) -> dict[str, Source]:
    """The layers or modules of a file, by name.

    Raises:
        AdapterError: a key, a shape or a type that is no LoRA's, or a factor that is missing.
    """
    keys: dict[str, dict[str, str]] = {}
    for key in file.entries:
        for pattern, remedy in _REFUSED.items():
            if re.search(pattern, key):
                raise AdapterError(f"{file.path} has the key {key}: {remedy}")
        match = _KEY.fullmatch(key)
        if match is None or not known(match["name"]):
            raise AdapterError(
                f"{file.path} has the key {key}, which is no LoRA factor of a FLUX.1 pipeline; "
                "needed are transformer.LAYER.lora_A.weight and .lora_B.weight (diffusers), or "
                "lora_unet_MODULE.lora_down.weight and .lora_up.weight (kohya)"
            )
        kind = str(match.lastgroup)
        if kind in keys.setdefault(match["name"], {}):
            raise AdapterError(f"{file.path} has two keys for {kind} of {match['name']}: {key}")
        keys[match["name"]][kind] = key
    if not keys:
        raise AdapterError(f"{file.path} has no tensors, so it is no adapter")
    return {name: _source(file, name, found) for name, found in sorted(keys.items())}


def _source(file: TensorFile, name: str, keys: Mapping[str, str]) -> Source:
    kohyas = name.startswith(kohya.PREFIXES)
    for kind, theirs, ours in (("down", "lora_down", "lora_A"), ("up", "lora_up", "lora_B")):
        if kind not in keys:
            raise AdapterError(
                f"{file.path} lacks {name}.{theirs if kohyas else ours}.weight, but has "
                f"{', '.join(keys.values())}; it was cut or damaged: get it again"
            )
    down, up = file.entries[keys["down"]], file.entries[keys["up"]]
    alpha = keys.get("alpha")
    for key in (keys["down"], keys["up"]):
        if file.entries[key].dtype not in ("F64", "F32", "F16", "BF16"):
            raise AdapterError(
                f"{file.path}: {key} is {file.entries[key].dtype}; use float32, float16 or bfloat16"
            )
    if len(down.shape) != 2 or len(up.shape) != 2:
        raise AdapterError(
            f"{file.path}: {name} has factors of shape {down.shape} and {up.shape}; FLUX.1 has "
            "linear layers only, whose factors have two dimensions"
        )
    if down.shape[0] != up.shape[1] or not down.shape[0]:
        raise AdapterError(
            f"{file.path}: the ranks of {name} differ: {keys['down']} has {down.shape[0]} rows, "
            f"{keys['up']} has {up.shape[1]} columns; the file is damaged: get it again"
        )
    if alpha and file.entries[alpha].shape not in ((), (1,)):
        raise AdapterError(f"{file.path}: {alpha} needs one number")
    if kohyas and not kohya.sizes(name, up.shape[0]):
        raise AdapterError(
            f"{file.path}: {keys['up']} has {up.shape[0]} rows, which cannot be shared out among "
            f"{', '.join(kohya.parts(name))}; it is of another model than FLUX.1"
        )
    return Source(name, keys["down"], keys["up"], alpha, down.shape[0], up.shape[0])


def known(name: str) -> bool:
    """Whether a layer of diffusers' or a module of kohya's can be called so."""
    if name.startswith(kohya.PREFIXES):
        return bool(kohya.parts(name))
    part, _, rest = name.partition(".")
    return part in PARTS and bool(rest)
