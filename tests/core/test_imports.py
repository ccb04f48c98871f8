"""A serving installation has no torch: neither importing nor running the core asks for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "timm", "onnx", "nncf", "peft", "openvino_telemetry")

RUN = """
import sys
from dermaflux import Bundle, Classifier, Pipeline
from dermaflux import __main__, checkpoint, images
from dermaflux.engines import fake
from PIL import Image

bundle = Bundle.open({folder!r})
pipeline = Pipeline.open(bundle, engine={engine!r})
pipeline.generate([pipeline.request("benign lesion", seed=1)])
Classifier.open(bundle, {engine!r}).classify([Image.new("RGB", (64, 64))])
print([name for name in {heavy!r} if name in sys.modules])
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("engine", ["onnxruntime-cpu", "openvino-cpu"])
def test_the_core_runs_without_torch(tiny_bundle, engine):
    code = RUN.format(folder=str(tiny_bundle.path), engine=engine, heavy=HEAVY)
    assert python(code) == "[]"


def test_importing_loads_no_engine():
    libraries = ("onnxruntime", "openvino", *HEAVY)
    code = f"import sys, dermaflux; print([n for n in {libraries!r} if n in sys.modules])"
    assert python(code) == "[]"
