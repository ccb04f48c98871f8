"""Which model captions are asked of, and how it is opened: safetensors only, no code of its own.

>>> identity(Asking("Llama-3.2-11B-Vision-Instruct"))
{'name': 'Llama-3.2-11B-Vision-Instruct', 'sha256': '...', 'licence': 'llama3.2'}
>>> model, processor = opened(Asking("Llama-3.2-11B-Vision-Instruct", dtype="bf16"))
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, Final

from dermaflux.errors import EngineError, translated
from training.caption_text import DTYPES, Asking

_HASHED: Final = (".safetensors", ".json", ".jinja", ".model", ".txt")
"""Endings of the files that make a model what it is: weights, settings, tokenizer, template."""


def identity(asking: Asking) -> dict[str, str]:
    """What a caption says of its model: name, hash of a folder's files or revision, and licence.

    The licence is what the model card's header says, "unknown" where there is none.

    Raises:
        EngineError: there is no such folder, and no such model in the local cache.
    """
    folder = Path(asking.model)
    if (folder / "config.json").is_file():
        digest = hashlib.sha256()
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.suffix in _HASHED:
                with file.open("rb") as stream:
                    one = hashlib.file_digest(stream, "sha256").hexdigest()
                digest.update(f"{file.name} {one}\n".encode())
        name, which = folder.resolve().name, {"sha256": digest.hexdigest()}
    elif folder.is_dir():
        raise EngineError(
            f"{folder} is no model: it has no config.json; give the folder that save_pretrained "
            "wrote, or that was downloaded"
        )
    else:
        from transformers import AutoConfig

        # The library's first line says more of the network than of what to do.
        advice = "" if asking.download else " in the local cache; add --download, or give a folder"
        with translated(EngineError, f"there is no model {asking.model!r}{advice}"):
            config: Any = AutoConfig.from_pretrained(
                asking.model, revision=asking.revision, local_files_only=not asking.download
            )
        revision = getattr(config, "_commit_hash", None) or asking.revision
        name, which = asking.model, {"revision": str(revision)}
    return {"name": name, **which, "licence": _licence(folder / "README.md")}


def opened(asking: Asking) -> tuple[Any, Any]:
    """The model, in evaluation mode on its device, and its processor, padding on the left.

    Raises:
        EngineError: files are missing or damaged, or the model is of another kind.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    where = {
        "revision": asking.revision,
        "local_files_only": not asking.download,
        "trust_remote_code": False,
    }
    dtype = DTYPES[asking.dtype]
    spread = {"device_map": "auto"} if asking.device == "auto" else {}
    with translated(EngineError, f"the captioner {asking.model} cannot be opened{_pickle(asking)}"):
        processor: Any = AutoProcessor.from_pretrained(asking.model, **where)
        if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
            raise EngineError(
                f"the captioner {asking.model} has no processor for pictures and text, but a "
                f"{type(processor).__name__}; give an image-text-to-text model with its "
                "preprocessor_config.json"
            )
        model: Any = AutoModelForImageTextToText.from_pretrained(
            asking.model,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            **where,
            **spread,
        )
        if not spread:
            cuda = "cuda" if torch.cuda.is_available() else "cpu"
            model.to(asking.device or cuda)
    model.eval()
    tokenizer = processor.tokenizer
    # An answer follows its prompt at once: what is shorter is filled up before it.
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    settings = model.generation_config
    # Drawing tokens is `_sampler`'s; a model's own defaults would draw by batch.
    settings.update(
        do_sample=False, num_beams=1, temperature=1.0, top_p=1.0, top_k=50,
        max_length=None, max_new_tokens=asking.max_tokens, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    if settings.eos_token_id is None:
        settings.eos_token_id = tokenizer.eos_token_id
    return model, processor


def _pickle(asking: Asking) -> str:
    if not Path(asking.model).is_dir():
        return ""
    from dermaflux.engines.parts import pickled

    return pickled(Path(asking.model))


def _licence(card: Path) -> str:
    """`license:` of a model card's header, which publishers keep in its first lines."""
    try:
        header = card.read_text(encoding="utf-8", errors="replace").split("---")[1]
    except (OSError, IndexError):
        return "unknown"
    found: dict[str, str] = {
        key: value.strip()
        for key, value in re.findall(r"^(license|license_name): *(\S.*)$", header, re.MULTILINE)
    }
    return found.get("license_name") or found.get("license") or "unknown"
