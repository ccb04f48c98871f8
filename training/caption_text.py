"""What a model is asked and what becomes of its answer: the paper's prompt, its training text.

The paper asked Llama 3.2 (only its 11B and 90B members see pictures) and told it the label. A model
that is told the label explains the label, so there is a control, label-blind, in which neither the
prompt nor the text names it. How the paper decoded is not published; the defaults are greedy
decoding and at most 400 new tokens, which with the template stay under T5's 512.

    >>> asking = Asking("Llama-3.2-11B-Vision-Instruct", prompt=BLIND_PROMPT, temperature=0.7)
    >>> asking.decoding["strategy"]
    'sampling'
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from dermaflux.dataset import Record
from dermaflux.errors import DatasetError

PROMPT: Final = (
    "This is an image containing a {label} lesion. Give me a description of this mole regarding "
    "its asymmetry, border irregularity, and color."
)
"""The paper's, word for word (project page)."""
BLIND_PROMPT: Final = PROMPT.replace("a {label} lesion", "a lesion")
TEMPLATE: Final = (
    "This photo depicts a {label} lesion. {patient}Here's a description of the mole: \n\n{text}"
)
"""The paper's training text (method figure and demo prompts; the figure has "The photo" too)."""
BLIND_TEMPLATE: Final = TEMPLATE.replace("a {label} lesion", "a lesion")

DTYPES: Final = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_FIELDS: Final = {"prompt": {"label"}, "template": {"label", "patient", "text"}}


@dataclass(frozen=True)
class Asking:
    """What is asked of which model.

    `prompt` may hold `{label}`; `template` holds `{text}`, and may hold `{label}` and `{patient}`
    (`patient_sentence`, or nothing where sex and age are unknown or `patient` is False).
    `temperature` 0 decodes greedily; above, tokens are drawn from `top_p` of the probability, by
    `seed` and picture, so that a caption does not depend on its batch. `device` is torch's name,
    "auto" spreads the model over all GPUs (accelerate), "" is CUDA where there is one.

    Raises:
        DatasetError: a value out of range, or a text with another field than those.
    """

    model: str
    revision: str = "main"
    download: bool = False
    prompt: str = PROMPT
    template: str = TEMPLATE
    patient: bool = True
    batch: int = 8
    max_tokens: int = 400
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    dtype: str = "auto"
    device: str = ""

    def __post_init__(self) -> None:
        for name, known in _FIELDS.items():
            text = getattr(self, name)
            if unknown := set(re.findall(r"\{(\w*)\}", text)) - known:
                fields = ", ".join(f"{{{one}}}" for one in sorted(known))
                raise DatasetError(f"--{name} has {{{min(unknown)}}}; it may have {fields}")
        if "{text}" not in self.template:
            raise DatasetError("--template has no {text}, where the model's answer goes")
        if self.batch < 1 or self.max_tokens < 1:
            raise DatasetError(
                f"--batch is {self.batch}, --max-tokens {self.max_tokens}; use 1 or more"
            )
        if not 0 <= self.temperature <= 10 or not 0 < self.top_p <= 1:
            raise DatasetError(
                f"--temperature is {self.temperature}, --top-p {self.top_p}; use 0 to 10, and "
                "above 0 to 1"
            )
        if self.dtype not in DTYPES:
            raise DatasetError(f"--dtype {self.dtype!r} is not known; use {', '.join(DTYPES)}")

    @property
    def decoding(self) -> dict[str, Any]:
        """How tokens are chosen, for a caption's record and its key."""
        if self.temperature == 0:
            return {"strategy": "greedy", "max_tokens": self.max_tokens}
        return {
            "strategy": "sampling",
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
        }


def patient_sentence(record: Record) -> str:
    """The paper's sentence on the patient, a space at its end; empty where nothing is known.

    >>> patient_sentence(Record("7.jpg", "benign", sex="female", age=80))
    'This photo is taken from a female patient, who is 80.0 years old. '
    """
    if record.sex is None and record.age is None:
        return ""
    who = f"a {record.sex} patient" if record.sex else "a patient"
    age = "" if record.age is None else f", who is {float(record.age)} years old"
    return f"This photo is taken from {who}{age}. "


def text_of(record: Record, answer: str, template: str = TEMPLATE, patient: bool = True) -> str:
    """The training text of a record: its template filled in. Braces in `answer` stay as they are.

    >>> text_of(Record("7.jpg", "benign"), "The mole is round.")
    "This photo depicts a benign lesion. Here's a description of the mole: \\n\\nThe mole is round."
    """
    values = {"label": record.label, "patient": patient_sentence(record) if patient else ""}
    return re.sub(
        r"\{(label|patient|text)\}", lambda field: {**values, "text": answer}[field[1]], template
    )
