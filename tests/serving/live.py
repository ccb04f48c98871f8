"""The app over the real pipeline and classifier with fake engines, behind a real server.

A real server rather than a test client: chunked bodies, clients that leave and streams behave as
they do in service only there.
"""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import numpy as np
import uvicorn
from PIL import Image
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer, models, pre_tokenizers

from dermaflux.bundle import Bundle, ClassifierSpec, Defaults, Licence, Limits, ModelSpec, Parity
from dermaflux.classifier import Classifier
from dermaflux.engines import Array, Arrays, Choice, fake
from dermaflux.flow import Schedule
from dermaflux.intake import Intake
from dermaflux.pipeline import Pipeline
from dermaflux.prompt import WORDING
from dermaflux.tiers import tier
from dermaflux.tokens import Tokens
from serving.app import create_app
from serving.card import GoldenCard, ModelCard, card_of
from serving.connections import Connection
from serving.readiness import Readiness
from serving.scores import Local, Scores
from serving.scoring import Scoring
from serving.settings import Settings

MODEL = ModelSpec(
    latent_channels=16,
    scale=8,
    scaling_factor=1.0,
    shift_factor=0.0,
    text_length=16,
    clip_length=16,
    guidance_embeds=True,
)
LIMITS = Limits(min_size=32, max_size=256, size_multiple=16, max_steps=50, max_batch=4)
DEFAULTS = Defaults(steps=4, guidance=3.5, height=64, width=64)
SPEC = ClassifierSpec(
    classes=("benign", "malignant"),
    input_size=(3, 32, 32),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    interpolation="bicubic",
    crop_pct=1.0,
    temperature=1.0,
    threshold=0.4,
    abstain=(0.3, 0.5),
)


@dataclass
class Brake:
    """Holds the transformer at every step while it is closed, and counts the steps."""

    open: threading.Event = field(default_factory=threading.Event)
    steps: int = 0

    def __post_init__(self) -> None:
        self.open.set()

    def __call__(self) -> None:
        self.steps += 1
        assert self.open.wait(30), "the test forgot to open the brake"

    @contextmanager
    def closed(self) -> Iterator[None]:
        self.open.clear()
        try:
            yield
        finally:
            self.open.set()

    @contextmanager
    def step_by_step(self) -> Iterator[Callable[[], None]]:
        """What is given lets the step go that is held, and no other."""
        before, permits = self.open, Permits(0)
        self.open = permits  # type: ignore[assignment]

        def one() -> None:
            steps = self.steps
            permits.release()
            until(lambda: self.steps > steps)

        try:
            yield one
        finally:
            self.open = before
            permits.set()

    def wait_for(self, steps: int) -> None:
        until(lambda: self.steps >= steps)


class Permits(threading.Semaphore):
    """Stands in for what holds the transformer: lets through as many steps as are released."""

    def wait(self, timeout: float) -> bool:
        return self.acquire(timeout=timeout)

    def set(self) -> None:
        self.release(1000)


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until `condition` holds; a test fails if it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def tokens() -> Tokens:
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "benign": 1, "malignant": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(16)
    return Tokens(tokenizer, 16)


def tiny_card(settings: Settings, *, classifies: bool = True) -> ModelCard:
    """The card of a bundle that exists nowhere."""
    bundle = Bundle(
        path=Path("nowhere"),
        id="0123456789abcdef",
        schema=2,
        name="tiny",
        created="2026-01-01T00:00:00Z",
        made_by="dermaflux 0.1.0",
        parts={},
        files=(),
        model=MODEL,
        scheduler={},
        defaults=DEFAULTS,
        limits=LIMITS,
        wording=WORDING,
        classifier=SPEC if classifies else None,
        parity=Parity(images={}, classifier={}),
        golden=None,
        provenance={"licence": "Apache-2.0"},
        licences=(Licence("images", "CC0-1.0", "nobody"),),
    )
    parts = ("transformer", "classifier") if classifies else ("transformer",)
    other = (("other", "not here"),)
    choices = [Choice(part, "fake", "fp32", "a test", other) for part in parts]
    return card_of(bundle, choices, settings)


@dataclass(frozen=True)
class Live:
    """A running app: where it is, a client for it, and the brake of its transformer."""

    url: str
    client: httpx.Client
    brake: Brake
    registry: CollectorRegistry
    pipeline: Pipeline

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


@contextmanager
def running(
    *,
    fails: Exception | None = None,
    classifies: bool = True,
    intake: Intake | None = None,
    scores: Scores | None = None,
    prove: Callable[[], GoldenCard] | None = None,
    bundle: Bundle | None = None,
    **settings: object,
) -> Iterator[Live]:
    """The app with these settings on a free port; `fails` is raised by the transformer, `scores`
    stand in for the classifier, and `bundle` is what the doctor looks at.

    It is ready at once, or when `prove` says so.
    """
    configured = replace(Settings(), **settings)  # type: ignore[arg-type]
    brake = Brake()
    engines = fake.engines(MODEL)
    velocity = engines["transformer"]

    def braked(inputs: Arrays) -> dict[str, Array]:
        if fails is not None:
            raise fails
        brake()
        return velocity.run(inputs)

    def redness(inputs: Arrays) -> dict[str, Array]:
        red = inputs["pixel_values"][:, 0].mean(axis=(1, 2)) * 4
        logits = np.stack([-red, red], axis=1).astype(np.float32)
        looked = np.tile(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4), (len(red), 1, 1))
        return {"logits": logits, "features": logits, "saliency": looked}

    engines["transformer"] = fake.Fake(braked)
    origin = {"bundle": "0123456789abcdef", "model": "tiny", "wording": WORDING}
    pipeline = Pipeline(
        MODEL,
        Schedule(),
        LIMITS,
        DEFAULTS,
        {"tokenizer": tokens(), "tokenizer_2": tokens()},
        engines,
        origin,
        tier=None if configured.tier is None else tier(configured.tier),
    )
    if scores is None and classifies:
        opening: Future[Scoring] = Future()
        opening.set_result(Scoring(Classifier(SPEC, fake.Fake(redness), intake=intake)))
        scores = Local(opening)
    registry = CollectorRegistry()
    card = tiny_card(configured, classifies=classifies)
    readiness = Readiness()
    readiness.ready = prove is None
    app = create_app(pipeline, scores, card, configured, registry, readiness, bundle)
    if prove is not None:
        readiness.begin(prove)
    # With its protocol said, else asyncio lets small replies wait for the client (40 ms each).
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", lifespan="off", http=Connection)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
                yield Live(url, client, brake, registry, pipeline)
        finally:
            brake.open.set()
            server.should_exit = True
            thread.join(10)
            app.state.close()


def picture(red: int, form: str = "PNG", size: tuple[int, int] = (96, 80)) -> bytes:
    """A picture of one colour; the redder, the more malignant to the fake classifier."""
    stream = io.BytesIO()
    Image.new("RGB", size, (red, 120, 100)).save(stream, form)
    return stream.getvalue()
