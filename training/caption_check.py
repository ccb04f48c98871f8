"""What is wrong with a dataset's captions, before a generator learns it.

Kinds of problems:

* `empty`: no text;
* `contradiction`: the text claims the other label (`training.caption_claims`);
* `clip`, `t5`: more tokens than the text encoder reads. FLUX.1 reads 77 with CLIP, for one pooled
  vector, and 512 with T5 (256 for schnell); the limits are the checkpoint's. Captions as long as
  the paper's pass CLIP's by design (T5 reads on): `--allow clip` says that this is meant;
* `identical`: one text stands for more than a share of all groups (patients or lesions);
* `loop`: words repeated on end, as a model does that has lost its way;
* `prompt`: the text repeats the question;
* `markup`: special tokens of a chat, or letters that are none, in the text;
* `cut`: the model was stopped by its number of tokens before it came to an end;
* `refusal`: the model says that it will not or cannot.

    >>> problems([Record("7.jpg", "benign", text="This is melanoma.")], {})
    [Problem(kind='contradiction', file_name='7.jpg', detail="label benign, text 'melanoma'")]
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from dermaflux.dataset import Record
from dermaflux.tokens import Tokens
from training.caption_claims import claims
from training.caption_text import BLIND_PROMPT, PROMPT

KINDS: Final = (
    "empty", "contradiction", "clip", "t5", "identical", "loop", "prompt", "markup", "cut",
    "refusal",
)  # fmt: skip
IDENTICAL: Final = 0.1
"""Share of groups from which one text for many is a problem. Our choice: attribute captions have
few words, and their most frequent one stands for 6.3 % of the groups of ISIC 2017 and 5.5 % of
HAM10000's."""
TOKENIZERS: Final = {"clip": "tokenizer", "t5": "tokenizer_2"}
"""Kind -> the tokenizer of a checkpoint that counts for it."""

_LONGEST_LOOP: Final = 12  # words that may be repeated as one
_LOOP: Final = 3  # times on end; "very, very" is English, "the the the" is not
_LETTERS: Final = re.compile(r"([^\s.])\1{9}")
_MARKUP: Final = re.compile(
    r"<\|[^|<>]*\|>|</?(?:image|s|start_of_turn|end_of_turn|eos|bos|pad|unk)>|\[/?INST\]|"
    r"^\s*(?:assistant|user|system)\s*[:\n]|[\ufffd\x00-\x08\x0b-\x1f]",
    re.IGNORECASE,
)
_REFUSAL: Final = re.compile(
    r"\bi(?:'m| am) (?:very )?(?:sorry|afraid|unable|not able|not comfortable|just an ai|an ai)\b|"
    r"\bi (?:cannot|can't|can not|won't|will not|do not feel comfortable|don't feel comfortable|"
    r"must decline|apologi[sz]e)\b|\bas an ai\b|\bas a language model\b|\bmy apologies\b"
)


@dataclass(frozen=True)
class Problem:
    """`kind` is one of KINDS; `file_name` that of the first record where several share it."""

    kind: str
    file_name: str
    detail: str


def problems(
    records: Sequence[Record], tokenizers: Mapping[str, Tokens], identical: float = IDENTICAL
) -> list[Problem]:
    """All problems, in the order of the records; those of several records come last.

    `tokenizers` are `dermaflux.engines.eager.tokenizers`' of a checkpoint; without them lengths are
    not checked.
    """
    found = [one for record in records for one in _of_one(record, tokenizers)]
    return found + list(_shared(records, identical))


def lengths(records: Sequence[Record], tokenizers: Mapping[str, Tokens]) -> dict[str, Any]:
    """Kind -> limit, median, 95 % quantile and largest number of tokens, end token included."""
    told: dict[str, Any] = {}
    for kind, name in TOKENIZERS.items():
        if name in tokenizers:
            counts = [tokenizers[name].count(record.text) for record in records]
            told[kind] = {
                "limit": tokenizers[name].length,
                "median": float(np.median(counts)),
                "p95": float(np.quantile(counts, 0.95)),
                "max": max(counts),
                "over": sum(count > tokenizers[name].length for count in counts),
            }
    return told


def repetition(records: Sequence[Record]) -> dict[str, Any]:
    """`distinct` texts by texts, and the `most_common` one with its number of groups."""
    groups = _groups(records)
    texts = sum(bool(record.text.strip()) for record in records)
    most = max(groups, key=lambda text: len(groups[text]), default="")
    return {
        "texts": texts,
        "distinct": len(groups),
        "most_common": {"text": most[:200], "groups": len(groups.get(most, ()))},
    }


def loops(text: str) -> str | None:
    """What a text repeats at least three times on end, or as whole sentences; None where nothing.

    >>> loops("It is the the the mole.")
    'the'
    """
    if letters := _LETTERS.search(text):
        return letters[0]
    words = re.findall(r"[^\W_]+(?:['-][^\W_]+)*", text.lower())
    for length in range(1, min(_LONGEST_LOOP, len(words) // _LOOP) + 1):
        same = 0
        for place in range(length, len(words)):
            same = same + 1 if words[place] == words[place - length] else 0
            if same == length * (_LOOP - 1):
                return " ".join(words[place - length + 1 : place + 1])
    sentences = Counter(
        " ".join(sentence.lower().split())
        for sentence in re.split(r"[.!?\n]+", text)
        if len(sentence.split()) > 2
    )
    often = sentences.most_common(1)
    return often[0][0] if often and often[0][1] >= _LOOP else None


def _of_one(record: Record, tokenizers: Mapping[str, Tokens]) -> Iterator[Problem]:
    def problem(kind: str, detail: str) -> Problem:
        return Problem(kind, record.file_name, detail)

    text = record.text
    if not text.strip():
        yield problem("empty", "there is no text")
        return
    for label, words in claims(text).items():
        if label != record.label:
            yield problem("contradiction", f"label {record.label}, text {words!r}")
    for kind, name in TOKENIZERS.items():
        if name in tokenizers:
            count, limit = tokenizers[name].count(text), tokenizers[name].length
            if count > limit:
                yield problem(kind, f"{count} tokens; {name} gives its encoder {limit}")
    if loop := loops(text):
        yield problem("loop", f"{loop[:80]!r} on end")
    if asked := _asked(record):
        yield problem("prompt", f"the text has {asked!r}")
    if markup := _MARKUP.search(text):
        yield problem("markup", f"the text has {markup[0]!r}")
    told = record.more.get("caption")
    decoding = told.get("decoding") if isinstance(told, Mapping) else None
    if isinstance(decoding, Mapping) and decoding.get("cut"):
        yield problem("cut", f"the text ends in {text[-20:]!r}; caption it with more --max-tokens")
    if refusal := _REFUSAL.search(text.lower().replace("\u2019", "'")):
        yield problem("refusal", f"the text has {refusal[0]!r}")


def _asked(record: Record) -> str | None:
    """A sentence of the prompt that the text repeats: of its own prompt, or of the paper's."""
    told = record.more.get("caption")
    own = told.get("prompt") if isinstance(told, Mapping) else None
    text = _plain(record.text)
    for prompt in (own, PROMPT, BLIND_PROMPT):
        if not isinstance(prompt, str):
            continue
        for sentence in re.split(r"(?<=[.?!])\s+", prompt.replace("{label}", record.label)):
            # Of one or two words a caption may well have the same.
            if len(sentence.split()) > 3 and _plain(sentence) in text:
                return sentence
    return None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _groups(records: Sequence[Record]) -> dict[str, dict[str, None]]:
    """Text -> its groups: two pictures of one lesion may well have one caption."""
    groups: dict[str, dict[str, None]] = defaultdict(dict)
    for record in records:
        if text := " ".join(record.text.split()):
            groups[text][record.group] = None
    return groups


def _shared(records: Sequence[Record], identical: float) -> Iterator[Problem]:
    groups = _groups(records)
    everything = len({record.group for record in records})
    first = {" ".join(record.text.split()): record.file_name for record in reversed(records)}
    for text, owners in groups.items():
        if len(owners) > max(1, identical * everything):
            share = len(owners) / everything
            yield Problem(
                "identical", first[text],
                f"{len(owners)} of {everything} groups ({share:.0%}) have {text[:80]!r}",
            )  # fmt: skip
