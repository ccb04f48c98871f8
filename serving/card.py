"""The model card: what serves here, from what it was made, under which licences, how well it runs.

`GET /v1/model` returns it, the page builds its form from it, and the routes take from it what they
must know of a bundle, so that a test can hand in a card without a bundle.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from dermaflux.bundle import GENERATOR_PARTS, Bundle
from dermaflux.engines import Choice
from dermaflux.prompt import DIAGNOSES, VOCABULARY
from serving.keyring import Role
from serving.schema import MAX_RATIO, MIN_SIDE
from serving.settings import Settings
from serving.wishes import MAX_PREVIEWS

NOTICE = (
    "Research use only; not a medical device. Generated images are synthetic, show no person, "
    "and are marked as such. A classification is no diagnosis."
)


class LicenceCard(BaseModel):
    """The licence of one ingredient."""

    name: str
    licence: str
    attribution: str


class DefaultsCard(BaseModel):
    """What a request gets that does not say otherwise."""

    steps: int
    guidance: float | None
    height: int
    width: int


class LimitsCard(BaseModel):
    """What a request may ask for; sizes are pixels of each side."""

    min_size: int
    max_size: int
    size_multiple: int
    max_steps: int
    max_images: int
    max_previews: int = MAX_PREVIEWS
    max_upload_bytes: int
    max_batch_files: int
    max_batch_bytes: int
    min_upload_side: int = MIN_SIDE
    max_upload_ratio: int = MAX_RATIO
    deadline_seconds: float
    waiting: int


class RejectedEngine(BaseModel):
    """An engine that was not taken, and why."""

    name: str
    why: str


class EngineCard(BaseModel):
    """Which engine runs a part, in which precision, and why."""

    part: str
    engine: str
    device: str
    precision: str
    reason: str
    rejected: list[RejectedEngine]
    note: str = Field(
        default="",
        description="What it says of how it was opened, such as that what is not in 8 bits is in "
        "bf16; empty where nothing.",
    )


class GoldenCard(BaseModel):
    """What became of the image that the export stored and this service drew again."""

    result: Literal["pending", "passed", "failed", "skipped", "absent"]
    psnr_db: float | None = Field(default=None, description="How near it is; 99 is equal.")
    tolerance_db: float | None = Field(default=None, description="How near it has to be.")
    words: str


class ClassifierCard(BaseModel):
    """How a probability becomes a decision."""

    classes: list[str]
    threshold: float
    abstain: tuple[float, float]
    temperature: float
    input_size: tuple[int, int, int]
    tier: str | None = Field(
        default=None, description="What it gives up for speed; null: the fastest precision."
    )


class QueueCard(BaseModel):
    """The generator's queue now; a request for n images counts n."""

    waiting: int
    running: int
    limit: int = Field(description="Images that are drawn together at most.")
    rates: dict[str, float] = Field(
        description="Steps of one image a second by batch, as measured right after the start; "
        "empty before, and where the limit was set by the operator."
    )
    usual_seconds: float = Field(
        description="What an image of default size and steps takes, as measured lately."
    )
    backlog_seconds: float = Field(description="What all that is here takes.")
    draining: bool = Field(description="Nothing more is taken: the service is stopping.")
    mine: list[int] = Field(
        description="For each image of the caller that is not done, how many are before it; 0: it "
        "is being drawn."
    )


class BatchCard(BaseModel):
    """What drawing together gains here, as measured right after the start."""

    limit: int
    rates: dict[str, float] = Field(description="Steps of one image a second by batch.")


class KeptCard(BaseModel):
    """Under which policy it serves, and what is kept of what it does."""

    policy: str = Field(description="Under which the licences of all ingredients were judged.")
    audit: bool = Field(description="Each request is recorded, without pictures and prompts.")
    signed: bool = Field(description="Images are signed, and their pixels registered.")
    watermark: bool = Field(description="Images have an invisible watermark.")


class FindingCard(BaseModel):
    """What the doctor found of one thing, and what mends it."""

    about: str
    state: Literal["ok", "note", "fail"]
    words: str
    mend: str


class DoctorCard(BaseModel):
    """What `python -m serving.doctor --quick` says here, some seconds old at most."""

    healthy: bool
    findings: list[FindingCard]


class ModelCard(BaseModel):
    """All that the service says of itself."""

    name: str
    bundle: str
    created: str
    made_by: str
    notice: str = NOTICE
    licences: list[LicenceCard]
    provenance: dict[str, Any]
    defaults: DefaultsCard
    limits: LimitsCard
    wording: str
    text_length: int
    vocabulary: dict[str, list[str]] = {name: list(words) for name, words in VOCABULARY.items()}
    diagnoses: dict[str, str | None] = dict(DIAGNOSES)
    engines: list[EngineCard]
    tier: str | None = Field(
        default=None,
        description="What drawing gives up for speed: with cached, steps are forecast; null: the "
        "fastest precision, every step computed.",
    )
    turns: list[list[str]] = Field(
        description="Parts in memory together; more than one list: loaded anew for every image."
    )
    golden: GoldenCard
    parity: dict[str, Any]
    classifier: ClassifierCard | None
    kept: KeptCard
    doctor: DoctorCard | None = Field(
        default=None, description="For the role admin alone, and not where everybody has it."
    )
    batch: BatchCard | None = Field(default=None, description="Null until it was measured.")
    caller: str | None = Field(default=None, description="Who asked: the id of the key, if any.")
    roles: list[Role] = Field(default=[], description="What who asked may do.")


def card_of(
    bundle: Bundle,
    choices: Iterable[Choice],
    settings: Settings,
    turns: Iterable[Sequence[str]] = (GENERATOR_PARTS,),
) -> ModelCard:
    """The card of an opened bundle whose parts run as `choices` say, in memory by `turns`."""
    spec = bundle.classifier if settings.classifier else None
    return ModelCard(
        name=bundle.name,
        bundle=bundle.id,
        created=bundle.created,
        made_by=bundle.made_by,
        licences=[LicenceCard(**asdict(licence)) for licence in bundle.licences],
        provenance=dict(bundle.provenance),
        defaults=DefaultsCard(**asdict(bundle.defaults)),
        limits=LimitsCard(
            min_size=bundle.limits.min_size,
            max_size=bundle.limits.max_size,
            size_multiple=bundle.limits.size_multiple,
            max_steps=bundle.limits.max_steps,
            max_images=settings.max_images,
            max_upload_bytes=settings.max_upload_bytes,
            max_batch_files=settings.max_batch_files,
            max_batch_bytes=settings.max_batch_bytes,
            deadline_seconds=settings.deadline_seconds,
            waiting=settings.waiting,
        ),
        wording=bundle.wording,
        text_length=bundle.model.text_length,
        engines=[
            EngineCard(
                part=choice.part,
                engine=choice.engine,
                device=choice.device,
                precision=choice.precision,
                reason=choice.reason,
                rejected=[RejectedEngine(name=name, why=why) for name, why in choice.rejected],
            )
            for choice in choices
        ],
        tier=settings.tier,
        turns=[list(group) for group in turns],
        golden=GoldenCard(result="pending", words="Nothing has run yet."),
        parity=asdict(bundle.parity),
        kept=KeptCard(
            # Of a file its name alone: where it lies is its operator's business.
            policy=Path(settings.policy).name,
            audit=settings.audit is not None,
            signed=settings.marks is not None,
            watermark=settings.watermark,
        ),
        classifier=None
        if spec is None
        else ClassifierCard(
            classes=list(spec.classes),
            threshold=spec.threshold,
            abstain=spec.abstain,
            temperature=spec.temperature,
            input_size=spec.input_size,
            tier=settings.classifier_tier,
        ),
    )
