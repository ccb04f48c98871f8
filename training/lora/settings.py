"""What a LoRA run is told: one frozen dataclass, checked before anything is opened.

Every field's help is its documentation on the command line. The paper does not publish its recipe;
where it is silent the field's best practice is the default, and the help says whose.

    >>> parsed(["models/mini", "--data", "dataset", "--out", "runs/lora", "--steps", "500"]).rank
    64
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from dermaflux.command import names, option
from dermaflux.errors import DermaFluxError
from training.data import count

BALANCES: Final = ("label", "diagnosis", "source", "confirmed", "sex", "site", "skin_type")
ENCODERS: Final = ("text_encoder", "text_encoder_2")
LATER: Final = ("out", "cache", "held_out", "steps", "save_minutes", "prompts", "preview_steps",
                "compile", "checkpointing", "micro", "threads", "device", "shard")  # fmt: skip
"""Settings that a resumed run may change: they move no number, but how long it goes on."""


class SettingsError(DermaFluxError):
    """A setting of a training run is out of range, or contradicts another or the base."""


def _choice(text: str, default: str, choices: tuple[str, ...]) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """One run of `python -m training.lora`.

    Raises:
        SettingsError: a value is out of range, or two contradict each other.
    """

    base: Path = option("a diffusers folder of a Flux pipeline, or BFL's single .safetensors file")
    data: tuple[Path, ...] = option("a dataset's folder (metadata.jsonl); repeatable")
    out: Path = option("the run's folder: state, log, adapter.safetensors; resumed where it is")
    encoders: Path | None = option(
        "for a single file: the diffusers folder with all the other parts", None
    )
    cache: Path | None = option("folder of cached latents and texts (default: OUT/cache)", None)
    split: str = option("the split that is trained on", "train")
    only: tuple[str, ...] = option(
        f"KEY=WORD: train on these pictures alone; KEY is one of {', '.join(BALANCES)}; "
        "repeatable, and all have to hold",
        (),
    )
    held_out: tuple[Path, ...] = option(
        "a dataset whose test split must not be seen, beside the test splits of --data; repeatable",
        (),
    )
    steps: int = option("optimizer steps", 2000)
    batch: int = option("pictures per optimizer step, over all processes and accumulations", 4)
    micro: int = option("pictures per forward of one process (0: its whole share)", 0)
    rank: int = option(
        "LoRA's rank; 64 is inferred from the name of the paper's published file", 64
    )
    alpha: float = option("LoRA's alpha: the update is scaled by alpha / rank", 64.0)
    targets: tuple[str, ...] = option(
        "fnmatch patterns of layers to adapt, such as *.attn.*; default: all linears of all blocks",
        ("*",),
    )
    text_encoders: tuple[str, ...] = option(
        "text encoders to adapt too: text_encoder (CLIP), text_encoder_2 (T5); their texts are "
        "then not cached",
        (),
    )
    optimizer: str = _choice(
        "prodigy estimates its own rate: give --rate 1", "adamw", ("adamw", "adamw8bit", "prodigy")
    )
    rate: float = option("the learning rate; 1e-4 is what diffusers' and kohya's recipes use", 1e-4)
    decay: float = option("decoupled weight decay", 1e-2)
    warmup: int = option("steps over which the rate rises", 50)
    schedule: str = _choice("the rate after its warm-up", "cosine", ("cosine", "constant"))
    clip: float = option("largest norm of the gradient", 1.0)
    ema: float = option("decay of the average that is written; 0 writes the last weights", 0.99)
    timesteps: str = _choice(
        "how noise shares are drawn: shifted is logit-normal, moved by the scheduler's own "
        "resolution-dependent shift (Esser et al., arXiv 2403.03206)",
        "shifted",
        ("uniform", "logit-normal", "shifted"),
    )
    guidance: float = option("the guidance told to a guidance-distilled base", 1.0)
    caption_dropout: float = option("share of pictures that are shown without their text", 0.1)
    trigger: str = option("words put before every caption", "")
    balance: tuple[str, ...] = option(
        f"drawn equally often: every combination of these of {', '.join(BALANCES)}; "
        "'none' draws pictures as often as they are there",
        ("label",),
    )
    sizes: tuple[int, ...] = option(
        "sides of the squares, in pixels, whose area pictures are trained at (default: the base's, "
        "at most 512, at which the paper draws)",
        (),
    )
    aspect: float = option("largest ratio of a bucket's sides; 1 crops all to squares", 2.0)
    turns: int = option("flips to train on: 1 none, 2 left-right, 4 both ways", 4)
    base_dtype: str = _choice(
        "of the frozen weights: auto is bf16 on a GPU and fp32 on a CPU; fp8 needs torchao, 4bit "
        "bitsandbytes",
        "auto",
        ("auto", "bf16", "fp32", "fp16", "fp8", "4bit"),
    )
    checkpointing: bool = option("recompute activations in the backward pass: less memory", False)
    compile: bool = option("torch.compile each kind of block once; pays after some minutes", False)
    keep_encoders: bool = option("encode texts at every step instead of caching them", False)
    shard: bool = option(
        "cut the base into shards over all processes (FSDP 2) instead of copying it", False
    )
    device: str = option("torch's device (default: what accelerate picks)", "")
    threads: int = option("torch's threads in each process (0: torch's choice)", 0)
    seed: int = option("of weights, draws, noise and previews", 0)
    save_minutes: float = option("minutes between saved states: what a kill can lose", 5.0)
    prompts: tuple[str, ...] = option(
        "a prompt of a preview picture (seed 0, 1, ...); repeatable; none draws none", ()
    )
    preview_steps: int = option("steps between previews", 500)

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if not math.isfinite(value) or not least <= value <= most:
                raise SettingsError(f"{_flag(name)} {value} is out of range; use {least} to {most}")
        for name, known in (("balance", (*BALANCES, "none")), ("text_encoders", ENCODERS)):
            if wrong := [word for word in getattr(self, name) if word not in known]:
                raise SettingsError(
                    f"{_flag(name)} {wrong[0]!r} is not known; use {', '.join(known)}"
                )
        for one in self.only:
            key, _, word = one.partition("=")
            if key not in BALANCES or not word:
                raise SettingsError(
                    f"--only {one!r} is no KEY=WORD; KEY is one of {', '.join(BALANCES)}"
                )
        if "none" in self.balance and len(self.balance) > 1:
            raise SettingsError(
                f"--balance {','.join(self.balance)}: 'none' goes with nothing else; leave it out, "
                "or the others"
            )
        folders = [folder.resolve() for folder in self.data]
        if twice := [one for one in folders if folders.count(one) > 1]:
            raise SettingsError(
                f"--data names {twice[0]} twice, whose pictures would count twice; name it once"
            )
        if not self.targets:
            raise SettingsError("--targets names no layer; leave it out to adapt all")
        if self.turns not in (1, 2, 4):
            raise SettingsError(f"--turns {self.turns} is not known; use 1, 2 or 4")
        if self.out.exists() and not self.out.is_dir():
            raise SettingsError(f"--out {self.out} is a file; give a folder")

    def document(self, *, places: bool = True) -> dict[str, Any]:
        """For `settings.json`, the state and the adapter's description, which is published: without
        `places` folders and files have their last name alone."""
        return {one.name: _plain(getattr(self, one.name), places) for one in fields(self)}


_RANGES: Final = {
    "steps": (1, 10**8), "batch": (1, 2**20), "micro": (0, 2**20), "rank": (1, 4096),
    "alpha": (1e-6, 1e6), "rate": (0, 1e3), "decay": (0, 1), "warmup": (0, 10**7),
    "clip": (1e-6, 1e9), "ema": (0, 0.999999), "guidance": (0, 100), "caption_dropout": (0, 1),
    "aspect": (1, 4), "threads": (0, 4096), "seed": (0, 2**31 - 1), "save_minutes": (0, 1e6),
    "preview_steps": (1, 10**8),
}  # fmt: skip


def parsed(arguments: Sequence[str] | None) -> Settings:
    """The settings of a command line.

    Raises:
        SettingsError: see `Settings`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m training.lora", description="Train a LoRA on a Flux pipeline."
    )
    for one in fields(Settings):
        text, typed, flag = one.metadata["help"], str(one.type), _flag(one.name)
        if one.name == "base":
            parser.add_argument("base", type=Path, help=text)
        elif typed == "bool":
            parser.add_argument(flag, action="store_true", help=text)
        elif one.name in _REPEATED:
            kind = str if one.name in ("prompts", "only") else Path
            parser.add_argument(_REPEATED[one.name], dest=one.name, type=kind, action="append",
                                help=text,
                                required=one.default is MISSING, default=None)  # fmt: skip
        else:
            shown = "" if one.default in (MISSING, None, (), "") else f" [{_shown(one.default)}]"
            parser.add_argument(
                flag, type=_KINDS[typed], choices=one.metadata.get("choices"),
                required=one.default is MISSING, help=text + shown,
                **({} if one.default is MISSING else {"default": one.default}),
            )  # fmt: skip
    given = vars(parser.parse_args(arguments))
    given |= {name: tuple(given[name] or ()) for name in _REPEATED}
    return Settings(**given)


def write(settings: Settings) -> bytes:
    """The content of `settings.json`."""
    return (json.dumps(settings.document(), indent=2) + "\n").encode()


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(count(part) for part in names(text))


_KINDS: Final[dict[str, Any]] = {
    "str": str, "int": int, "float": float, "Path": Path, "Path | None": Path,
    "tuple[str, ...]": names, "tuple[int, ...]": _sizes,
}  # fmt: skip


_REPEATED: Final = {
    "data": "--data", "only": "--only", "held_out": "--held-out", "prompts": "--prompt",
}  # fmt: skip


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text.replace("%", "%%")


def _plain(value: Any, places: bool) -> Any:
    if isinstance(value, tuple):
        return [_plain(one, places) for one in value]
    if isinstance(value, Path):
        return str(value) if places else Path(os.path.abspath(value)).name
    return value


__all__ = ["LATER", "Settings", "SettingsError", "parsed", "write"]
