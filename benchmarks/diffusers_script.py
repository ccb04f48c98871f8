"""Runs a script of diffusers' examples as it is, on checkpoints whose tokenizers are one file each.

    python -m benchmarks.diffusers_script train_dreambooth_lora_flux.py \\
        --pretrained_model_name_or_path models/mini ...

Those scripts open tokenizers as `CLIPTokenizer` and `T5TokenizerFast`, and cut CLIP's texts at 77
tokens whatever the model's length. Where `model_index.json` names another class, as the embedded
default's does, they open `tokenizer.json` and cut at the checkpoint's own length. Nothing else of
the script is changed. At the end the largest memory on a GPU is told on stderr.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

PEAK: Final = "largest GPU memory in bytes: "


def open_one_file(folder: str, subfolder: str = "", **_: Any) -> Any:
    """`tokenizer.json` as something to call, with no length above the checkpoint's own."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, subfolder=subfolder)
    longest = tokenizer.model_max_length

    def called(texts: Any, *, max_length: int, **options: Any) -> Any:
        return tokenizer(texts, max_length=min(max_length, longest), **options)

    return called


@contextmanager
def one_file_tokenizers(base: Path) -> Iterator[None]:
    """Within the block both classes open `tokenizer.json`, where the checkpoint needs it."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    index = json.loads((base / "model_index.json").read_text())
    # The classes' own attribute, not the names in the package: what a script imports before them
    # may make the package anew.
    classes = [
        one
        for part, one, own in (
            ("tokenizer", CLIPTokenizer, "CLIPTokenizer"),
            ("tokenizer_2", T5TokenizerFast, "T5Tokenizer"),
        )
        if not str(index.get(part, [None, own])[1]).startswith(own)
    ]
    for one in classes:
        one.from_pretrained = staticmethod(open_one_file)
    try:
        yield
    finally:
        # What they inherit is to be seen again.
        for one in classes:
            del one.from_pretrained


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script of a command line, as `python SCRIPT ...` would."""
    script, *words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--pretrained_model_name_or_path", type=Path, required=True)
    base = parser.parse_known_args(words)[0].pretrained_model_name_or_path
    before, sys.argv = sys.argv, [script, *words]
    try:
        with one_file_tokenizers(base):
            runpy.run_path(script, run_name="__main__")
    finally:
        sys.argv = before
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        print(f"{PEAK}{torch.cuda.max_memory_allocated()}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
