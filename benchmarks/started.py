"""One start of the product, told in moments: run by `benchmarks.cold_start`, in a new process.

    python -m benchmarks.started generate bundles/mini '{"steps": 20}' lesion.png
    python -m benchmarks.started classify bundles/mini '{}' photograph.jpg

Does what `python -m dermaflux` does, in its order, and looks at the clock in between; the last line
is JSON, stage -> the moment when it was over, in ns of the clock that all processes share. The
first, `interpreter`, is when this file began: whoever started it knows when that was.
"""

import time

BEGAN = time.monotonic_ns()


def generate(folder: str, asked: dict[str, object], out: str) -> dict[str, int]:
    """One image, drawn and written."""
    moments = {"interpreter": BEGAN}
    from pathlib import Path
    from typing import Any

    from dermaflux import files
    from dermaflux.bundle import GENERATOR_PARTS, Bundle
    from dermaflux.doctor import damaged, files_of
    from dermaflux.images import encode_png
    from dermaflux.pipeline import Pipeline
    from dermaflux.residency import planned
    from dermaflux.tiers import tier

    moments["imports"] = time.monotonic_ns()
    bundle = Bundle.open(folder)
    opening: dict[str, Any] = {
        name: asked[name] for name in ("engine", "precision", "tier") if name in asked
    }
    chosen = {"tier": tier(opening["tier"])} if "tier" in opening else {}
    choices, _ = planned(bundle, **{**opening, **chosen})
    moments["bundle"] = time.monotonic_ns()
    assert not damaged(bundle, files_of(bundle, choices.values()))
    moments["verify"] = time.monotonic_ns()
    _library({choices[part].engine for part in GENERATOR_PARTS})
    moments["library"] = time.monotonic_ns()
    pipeline = Pipeline.open(bundle, **opening)
    moments["load"] = time.monotonic_ns()
    steps: Any = asked.get("steps")
    request = pipeline.request("dermoscopic image of a benign lesion, nevus", 0, steps)
    (pixels,) = pipeline.generate([request])
    moments["image"] = time.monotonic_ns()
    files.write(Path(out), encode_png(pixels, pipeline.record(request)))
    moments["write"] = time.monotonic_ns()
    return moments


def classify(folder: str, asked: dict[str, object], picture: str) -> dict[str, int]:
    """One photograph, judged."""
    moments = {"interpreter": BEGAN}
    from pathlib import Path
    from typing import Any

    from dermaflux.bundle import Bundle
    from dermaflux.classifier import Classifier
    from dermaflux.doctor import damaged, files_of
    from dermaflux.engines import choose
    from dermaflux.images import decode_upload

    moments["imports"] = time.monotonic_ns()
    bundle = Bundle.open(folder)
    engine: Any = asked.get("engine")
    precision: Any = asked.get("precision")
    choice = choose(bundle, "classifier", engine, precision)
    moments["bundle"] = time.monotonic_ns()
    assert not damaged(bundle, files_of(bundle, [choice]))
    moments["verify"] = time.monotonic_ns()
    _library({choice.engine})
    moments["library"] = time.monotonic_ns()
    classifier = Classifier.open(bundle, choice.engine, choice.precision)
    moments["load"] = time.monotonic_ns()
    classifier.classify([decode_upload(Path(picture).read_bytes())])
    moments["answer"] = time.monotonic_ns()
    return moments


def _library(engines: set[str]) -> None:
    """What the engines import when they are made, apart from making them."""
    from dermaflux.engines import OPENVINO, ORT

    if OPENVINO in engines:
        import dermaflux.engines.ov
    if ORT in engines:
        import dermaflux.engines.ort  # noqa: F401


def main() -> None:
    """Start, and print the moments."""
    import json
    import sys

    kind, folder, asked, path = sys.argv[1:]
    told = {"generate": generate, "classify": classify}[kind](folder, json.loads(asked), path)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
