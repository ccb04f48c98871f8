"""Prompt -> token ids of a fixed length, with the `tokenizers` library alone.

Flux does not mask its text, so padding is part of the picture: 64 tokens padded to 128 give
another image. The length is therefore fixed in `tokenizer.json`, by padding and truncation, and
never by a batch or a caller.

    >>> Tokens.open(Path("bundles/mini/tokenizer_2/tokenizer.json"), 64).ids(["a lesion"]).shape
    (1, 64)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dermaflux import files
from dermaflux.errors import BundleError, translated


class Tokens:
    """A tokenizer that pads and truncates to `length`; safe to share between threads.

    Raises:
        BundleError: it pads or truncates to another length, or not at all.
    """

    def __init__(self, tokenizer: Tokenizer, length: int, where: str = "the tokenizer") -> None:
        for name, found in (
            ("truncation", (tokenizer.truncation or {}).get("max_length")),
            ("padding", (tokenizer.padding or {}).get("length")),
        ):
            if found != length:
                raise BundleError(f"{where} has {name} to {found} tokens; the model needs {length}")
        self.length = length
        self._tokenizer = tokenizer
        self._counter = Tokenizer.from_str(tokenizer.to_str())
        self._counter.no_truncation()
        self._counter.no_padding()

    @property
    def largest(self) -> int:
        """The largest id that it can give: an embedding needs one row more."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @classmethod
    def open(cls, path: Path, length: int) -> Tokens:
        """Open a `tokenizer.json`.

        Raises:
            BundleError: it is damaged, or of another length.
        """
        with translated(BundleError, f"{path} is not a tokenizer"):
            tokenizer = Tokenizer.from_file(str(path))
        return cls(tokenizer, length, str(path))

    def ids(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Token ids [B, length]; what is too long is cut, its end token kept."""
        rows = [self._tokenizer.encode(prompt).ids for prompt in prompts]
        return np.array(rows, dtype=np.int64).reshape(len(prompts), self.length)

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`, length, padding and truncation inside; `open` reads it."""
        files.write(path, self._tokenizer.to_str(pretty=True).encode())

    def count(self, prompt: str) -> int:
        """How many tokens a prompt has, end token included, before padding and truncation."""
        return len(self._counter.encode(prompt).ids)
