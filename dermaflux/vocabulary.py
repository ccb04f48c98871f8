"""Are the files of a checkpoint's tokenizer whole, and does it fit its text encoder?

transformers opens CLIP's vocabulary without `merges.txt`, and takes words apart into letters. It
opens a `spiece.model` that was cut between two pieces, and leaves out its normalizer. Neither says
a word, and the images are of another prompt; so the files are read before transformers opens them.

    >>> list(problems(Path("FLUX.1-dev/tokenizer")))
    ['tokenizer/merges.txt is missing: without it words fall apart into letters']
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from dermaflux.errors import BundleError

FILES: Final = ("tokenizer.json", "vocab.json", "spiece.model")
"""Any of these makes a tokenizer; where there are several, transformers reads the first."""
END_OF_WORD: Final = "</w>"
UNIGRAM: Final = 1
"""`TrainerSpec.ModelType.UNIGRAM` of sentencepiece's `sentencepiece_model.proto`."""


def problems(folder: Path) -> Iterator[str]:
    """What is missing or damaged of the files that make the tokenizer in a folder, in words."""
    found = next((name for name in FILES if (folder / name).is_file()), None)
    if found is None:
        yield f"{folder.name}/ has none of {', '.join(FILES)}"
    elif found == "vocab.json":
        yield from _clip(folder)
    elif found == "spiece.model":
        yield from _sentencepiece(folder / found)
    else:
        try:
            Tokenizer.from_file(str(folder / found))
        except Exception as error:  # The library raises bare Exception.
            yield f"{folder.name}/{found} is damaged ({error})"


def require_rows(checkpoint: Path, name: str, encoder: str, largest: int) -> None:
    """Check that a text encoder has a row for every id of its tokenizer.

    Another model's tokenizer gives ids that fall out of the embedding, but at some prompts only.

    Raises:
        BundleError: `largest`, the tokenizer's largest id, is beyond the rows of the embedding.
    """
    config = json.loads((checkpoint / encoder / "config.json").read_text(encoding="utf-8"))
    rows = int(config["vocab_size"])
    if largest >= rows:
        raise BundleError(
            f"{checkpoint / name} gives ids up to {largest}, {encoder} has rows for 0 to "
            f"{rows - 1}: the tokenizer is another model's, or the two are swapped; take both from "
            "one checkpoint"
        )


def _clip(folder: Path) -> Iterator[str]:
    """Every merge joins two tokens into a third, and every token longer than a letter is joined."""
    where = f"{folder.name}/merges.txt"
    if not (folder / "merges.txt").is_file():
        yield f"{where} is missing: without it words fall apart into letters"
        return
    try:
        vocabulary = dict(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        special = {text for file in _settings(folder) for text in _strings(file)}
    except (OSError, ValueError, TypeError) as error:
        yield f"{folder.name}/ is damaged ({error})"
        return
    joined: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("#version"):
            continue
        pair = line.split(" ")
        unknown = [token for token in (*pair, "".join(pair)) if token not in vocabulary]
        if len(pair) != 2 or unknown:
            what = f"{unknown[0]!r} is not in vocab.json" if unknown else "it is not two tokens"
            yield f"{where} is damaged in line {number} ({what})"
            return
        joined.add("".join(pair))
    letters = {token for token in vocabulary if len(token.removesuffix(END_OF_WORD)) <= 1}
    rest = vocabulary.keys() - joined - letters - special
    if rest:
        yield (
            f"{where} joins {len(joined)} tokens and lacks {len(rest)} more of vocab.json, such as "
            f"{min(rest)!r}: it was cut, or is another vocabulary's"
        )


def _sentencepiece(file: Path) -> Iterator[str]:
    where = f"{file.parent.name}/{file.name}"
    if importlib.util.find_spec("sentencepiece") is None:
        yield (
            f"{where} has no tokenizer.json beside it and is read with sentencepiece, which is not "
            "installed; install it with: pip install sentencepiece"
        )
        return
    # Neither this package nor protobuf has types.
    form: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    model = form.ModelProto()
    decode: type[Exception] = importlib.import_module("google.protobuf.message").DecodeError
    try:
        model.ParseFromString(file.read_bytes())
    except decode as error:
        yield f"{where} is damaged ({error})"
        return
    # Pieces come first in the file, then these two: protobuf takes what ends early for whole.
    if not (model.HasField("trainer_spec") and model.HasField("normalizer_spec")):
        yield f"{where} is cut: it ends after {len(model.pieces)} pieces, before its normalizer"
    elif model.trainer_spec.model_type != UNIGRAM:
        yield f"{where} is no unigram model, which T5's is"


def _settings(folder: Path) -> Iterator[Any]:
    for name in ("special_tokens_map.json", "tokenizer_config.json", "added_tokens.json"):
        if (folder / name).is_file():
            yield json.loads((folder / name).read_text(encoding="utf-8"))


def _strings(value: Any) -> Iterator[str]:
    """All texts of a JSON value, keys too: special tokens are named in either."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
