"""A checkpoint's tokenizers -> the bundle's: `tokenizer.json`, and settings so that all read it.

FLUX.1 is downloaded with CLIP's `vocab.json` and `merges.txt` and T5's `spiece.model`, which every
version of transformers opens with other code, and gives other ids for odd prompts: 4.57 repairs and
unescapes CLIP's text where ftfy is installed. The bundle holds one form, which 4.57 and 5 read
alike, and which gives the ids of FluxPipeline under the transformers that exported it.

    >>> write(Checkpoint.open("models/mini"), Path("bundles/mini"))
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from dermaflux import files
from dermaflux.bundle import TOKENIZERS
from dermaflux.checkpoint import Checkpoint
from dermaflux.engines import eager

CLASS: Final = "PreTrainedTokenizerFast"
"""The one class of both versions that takes `tokenizer.json` as it is; others build it anew."""

_NAMED: Final = ("bos_token", "eos_token", "pad_token", "unk_token")


def write(checkpoint: Checkpoint, bundle: Path) -> None:
    """Both tokenizers' folders, and `model_index.json`, which names their class.

    Raises:
        BundleError: a tokenizer is missing or damaged, or does not fit its text encoder.
    """
    for name, tokens in eager.tokenizers(checkpoint).items():
        (bundle / name).mkdir()
        tokens.save(bundle / name / "tokenizer.json")
        stored = _read(bundle / name / "tokenizer.json")
        _write(bundle / name / "tokenizer_config.json", _config(checkpoint.path / name, stored))
    index = _read(checkpoint.path / "model_index.json")
    classes = {name: ["transformers", CLASS] for name in TOKENIZERS}
    _write(bundle / "model_index.json", {**index, **classes})


def _config(source: Path, stored: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json`: only what transformers would otherwise guess."""
    told: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).is_file():
            told |= _read(source / name)
    config = {
        "tokenizer_class": CLASS,
        "model_max_length": stored["truncation"]["max_length"],
        "padding_side": stored["padding"]["direction"].lower(),
        "truncation_side": stored["truncation"]["direction"].lower(),
    }
    for name in _NAMED:
        value = told.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if text is not None:
            config[name] = text
    config["pad_token"] = stored["padding"]["pad_token"]
    # transformers 4 puts False into the pre-tokenizer where this is not said.
    splitting = stored.get("pre_tokenizer") or {}
    if "add_prefix_space" in splitting:
        config["add_prefix_space"] = splitting["add_prefix_space"]
    return config


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _write(file: Path, content: Mapping[str, Any]) -> None:
    files.write(file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
