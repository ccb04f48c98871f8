"""Two bundles of tiny checkpoints, exported once per session by their own command line."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from dermaflux.bundle import GENERATOR_PARTS, Bundle
from export.__main__ import main
from tests.tiny import write_checkpoint


@pytest.fixture(scope="session")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """All parts in fp32, int8 and fp8; not to be written to."""
    arguments = ["--prompts", "4", "--precision", "fp32,int8,fp8"]
    return _once(tmp_path_factory, "exported", tiny_checkpoint, arguments)


@pytest.fixture(scope="session")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Without guidance, classifier and VAE encoder, in fp32, fp16 and bf16."""
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("schnell"), guided=False)
    for file in (checkpoint / "classifier").iterdir():
        file.unlink()
    (checkpoint / "classifier").rmdir()
    levels = ["--precision", "bf16,fp16,fp32"]
    arguments = ["--prompts", "2", *levels, "--parts", ",".join(GENERATOR_PARTS)]
    return _once(tmp_path_factory, "schnell_bundle", checkpoint, arguments)


def _once(
    factory: pytest.TempPathFactory, name: str, checkpoint: Path, arguments: Sequence[str]
) -> Bundle:
    shared = factory.getbasetemp()
    # Workers of pytest-xdist have folders of their own below one that belongs to the session.
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / name
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "bundle.json").is_file():
            assert main([str(checkpoint), "--out", str(folder), *arguments]) == 0
    return Bundle.open(folder)
