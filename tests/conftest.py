"""Fixtures of every test: the embedded default, a bundle exported from it, and tiny stand-ins.

`checkpoint` and `bundle` are the real ones, for what only real weights can show; `tiny_bundle` and
`fake_pipeline` take milliseconds. `DERMAFLUX_TEST_CHECKPOINT` and `DERMAFLUX_TEST_BUNDLE` name
others to be tested instead.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dermaflux.bundle import Bundle, Defaults, Limits, ModelSpec
from dermaflux.engines import fake
from dermaflux.flow import Schedule
from dermaflux.pipeline import Pipeline
from dermaflux.tokens import Tokens
from tests.tiny_bundle import write_bundle, write_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The embedded default's folder."""
    folder = Path(os.environ.get("DERMAFLUX_TEST_CHECKPOINT", ROOT / "models/mini"))
    if not (folder / "provenance.json").is_file():
        pytest.fail(f"there is no checkpoint at {folder}; name one in DERMAFLUX_TEST_CHECKPOINT")
    return folder


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of `checkpoint` in fp32 and int8, exported once per session by its own command."""
    if "DERMAFLUX_TEST_BUNDLE" in os.environ:
        return Path(os.environ["DERMAFLUX_TEST_BUNDLE"])
    shared = tmp_path_factory.getbasetemp()
    # Workers of pytest-xdist have folders of their own below one that belongs to the session.
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "bundle"
    with (shared / "bundle.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "bundle.json").is_file():
            command = [sys.executable, "-m", "export", str(checkpoint), "--out", str(folder)]
            # A twelfth of the minutes that 64 take; the figures of 64 are committed.
            command += ["--prompts", "8"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of hand-made graphs; not to be written to."""
    return Bundle.open(write_bundle(tmp_path_factory.mktemp("tiny_bundle")))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights, shaped unlike the embedded default."""
    pytest.importorskip("diffusers")
    from tests.tiny import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("tiny_checkpoint"))


@pytest.fixture(scope="session")
def fake_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A pipeline over engines of numpy."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, length in (("tokenizer", 12), ("tokenizer_2", 16)):
        write_tokenizer(folder / f"{name}.json", length)
    model = ModelSpec(
        latent_channels=16,
        scale=8,
        scaling_factor=0.5,
        shift_factor=0.1,
        text_length=16,
        clip_length=12,
        guidance_embeds=True,
    )
    return Pipeline(
        model,
        Schedule(shift=3.0),
        Limits(min_size=32, max_size=128, size_multiple=16, max_steps=20, max_batch=4),
        Defaults(steps=4, guidance=3.5, height=64, width=64),
        {
            "tokenizer": Tokens.open(folder / "tokenizer.json", 12),
            "tokenizer_2": Tokens.open(folder / "tokenizer_2.json", 16),
        },
        fake.engines(model),
    )
