"""What a picture needs to pass the gate: `Thresholds`, read strictly from a YAML file.

    agreement: 0.05         # calibrated probability of the asked label that is needed, 0..1; or
                            # `decision`: the classifier's is not the other label; or `none`
    attributes: [lesion, size, colors]  # what must be seen; [] to measure only; `none` to not even
    size_steps: 1           # how far from the asked size: small, medium, large, edge
    color_share: 0.02       # of the lesion's pixels that are not skin, for every colour asked for
    nearest: 0.7            # similarity to a picture seen in training from which it is a copy
    copies: 0.7             # the same for two pictures of the job

These are the defaults; a file may leave keys out. Each is in the job's manifest.

    >>> Thresholds.open(Path("gate.yaml"))
    Thresholds(agreement=0.05, attributes=('lesion', 'size', 'colors'), size_steps=1, ...)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from dermaflux.duplicates import SAME
from dermaflux.errors import DatasetError
from dermaflux.prompt import SIZES
from serving.batch import documents

OFF: Final = "none"
DECISION: Final = "decision"
SEEN: Final = ("lesion", "size", "colors")
"""What can be told of a generated picture. Asymmetry and border are measured and recorded, but
their words agree with what was asked no better than chance does, and not on photographs either."""
STEPS: Final = tuple(SIZES)
"""From small to edge: a lesion cut off by the edge may have any diameter, and most are large."""


@dataclass(frozen=True)
class Thresholds:
    """What a picture needs to pass; `None` turns a rule off, for `agreement` it is "none".

    The defaults were taken from the 585 test photographs of ISIC 2017, whose labels are experts'
    and whose attributes were measured with masks. Of these a rule rejects: no lesion, 1.4 %; size
    off by more than one step, 5 % (off at all, 27 %); a colour under 0.02, 1.0 %. A
    label to which the embedded bundle's calibrated classifier gives less than one chance in twenty:
    none of the benign, 5 % of the malignant. `decision` would reject 39 % and 3 %, for the
    threshold of that classifier is one of high sensitivity.

    Raises:
        DatasetError: a value is of another type or out of range; the message names the key.
    """

    agreement: str | float = 0.05
    attributes: tuple[str, ...] | None = SEEN
    size_steps: int = 1
    color_share: float = 0.02
    nearest: float | None = SAME
    copies: float | None = SAME

    def __post_init__(self) -> None:
        if self.agreement not in (DECISION, OFF):
            self._number("agreement", 0, 1, f"`{DECISION}`, `{OFF}`, or a number")
        if self.attributes is not None:
            self._words()
        if isinstance(self.size_steps, bool) or not isinstance(self.size_steps, int):
            raise _wrong("size_steps", self.size_steps, "a whole number, 0 to 3")
        if not 0 <= self.size_steps < len(STEPS):
            raise _wrong("size_steps", self.size_steps, "a whole number, 0 to 3")
        self._number("color_share", 0, 1, "a number")
        if self.nearest is not None:
            self._number("nearest", 0, 1, f"`{OFF}`, or a number")
        if self.copies is not None:
            # Less alike pairs are not even looked for.
            self._number("copies", SAME, 1, f"`{OFF}`, or a number")

    @classmethod
    def open(cls, file: Path) -> Thresholds:
        """The thresholds of a YAML file.

        Raises:
            DatasetError: `documents.read` refuses it, a key is unknown, or `Thresholds` refuses a
                value; the message names file and key.
        """
        content = documents.read(file)
        if content is None:
            return cls()
        if not isinstance(content, Mapping):
            raise DatasetError(f"{file} needs keys with values, such as `agreement: {DECISION}`")
        try:
            return cls.from_mapping(content)
        except DatasetError as error:
            raise DatasetError(f"{file}: {error}") from error

    @classmethod
    def from_mapping(cls, content: Mapping[Any, Any]) -> Thresholds:
        """The thresholds that a file's mapping says: `none`, or YAML's `off`, turns a rule off.

        Raises:
            DatasetError: a key is unknown, or a value is refused.
        """
        known = [field.name for field in fields(cls)]
        given: dict[str, Any] = {}
        for key, value in content.items():
            if key not in known:
                raise DatasetError(f"{documents.written(key)} is not a key; use {', '.join(known)}")
            if value is None:
                raise DatasetError(f"{key} has no value; give one, or leave the key out")
            off = value is False or value == OFF
            if off and key in ("size_steps", "color_share"):
                raise DatasetError(f"{key} cannot be off; leave its word out of `attributes`")
            given[key] = (OFF if key == "agreement" else None) if off else value
        return cls(**given)

    def _number(self, key: str, low: float, high: float, words: str) -> None:
        value = getattr(self, key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:
            raise _wrong(key, value, f"{words} from {low:g} to {high:g}")

    def _words(self) -> None:
        words = self.attributes
        if isinstance(words, str) or not isinstance(words, list | tuple):
            raise _wrong("attributes", words, f"`{OFF}`, or a list of {', '.join(SEEN)}")
        for word in words:
            if word in ("asymmetry", "border"):
                raise DatasetError(
                    f"attributes: {word} is measured and recorded, but too uncertain to decide; "
                    f"use {', '.join(SEEN)}"
                )
            if word not in SEEN:
                raise DatasetError(
                    f"attributes: {documents.written(word)} is not known; use {', '.join(SEEN)}"
                )
        if len(set(words)) != len(words):
            raise DatasetError(f"attributes: {documents.written(words)} names a word twice")
        # JSON has lists alone: what a manifest gives back is what was written.
        object.__setattr__(self, "attributes", tuple(words))


def _wrong(key: str, value: object, needed: str) -> DatasetError:
    text = documents.written(value)
    return DatasetError(f"{key} is {text if len(text) < 60 else text[:57] + '...'}; use {needed}")
