"""Encoded prompts, kept for whoever asks for the same again: both text encoders run once a text.

The largest of FLUX.1's encoders has more weights than fit on many cards beside its transformer,
and what it gives depends on the token ids alone; so those are the key.

    >>> texts = Texts(pipeline)
    >>> texts.of(["benign lesion", "benign lesion"])    # one row encoded, the same one twice
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from dermaflux.denoise import Text
from dermaflux.pipeline import Pipeline

KEPT_BYTES = 128_000_000
"""Memory of the texts that are kept: 15 of FLUX.1-dev (512 tokens of 4,096 float32), thousands of
the embedded default."""


class Texts:
    """The texts of a pipeline, the last used ones kept. Belongs to one thread at a time."""

    def __init__(self, pipeline: Pipeline, kept_bytes: int = KEPT_BYTES) -> None:
        self._pipeline = pipeline
        self._kept_bytes = kept_bytes
        self._kept: OrderedDict[bytes, Text] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, prompts: Sequence[str]) -> list[Text]:
        """A text of one row for each prompt, in order. What is new is encoded in batches.

        Raises:
            EngineError: an encoder failed.
        """
        tokenizers = self._pipeline.tokenizers
        ids = [tokenizers[name].ids(prompts) for name in ("tokenizer", "tokenizer_2")]
        keys = [b"".join(one[row].tobytes() for one in ids) for row in range(len(prompts))]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        missing = {k: p for k, p in zip(keys, prompts, strict=True) if k not in found}
        most = self._pipeline.limits.max_batch
        for start in range(0, len(missing), most):
            some = list(missing)[start : start + most]
            together = self._pipeline.encode([missing[key] for key in some])
            found.update((key, together.take([row])) for row, key in enumerate(some))
        for key in keys:
            self._keep(key, found[key])
        return [found[key] for key in keys]

    def _keep(self, key: bytes, text: Text) -> None:
        if key not in self._kept:
            self._kept[key] = text
            self._bytes += _size(text)
        self._kept.move_to_end(key)
        while self._bytes > self._kept_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _size(oldest)


def _size(text: Text) -> int:
    return text.embeddings.nbytes + text.pooled.nbytes
