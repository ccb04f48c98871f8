"""LitServe over a torch model, as its documentation does it: batches of 8, workers as processes.

    python -m benchmarks.rivals_http.litserve_server --checkpoint runs/b16 --port 8002

The body is the JPEG itself, which spares LitServe a form or base64 within JSON. Each worker decodes
what it takes, batches it and runs the model with `--threads` of torch's.

Source: LitServe's documentation, "Batching" (`max_batch_size`, `batch_timeout`) and "LitServer"
(`workers_per_device`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import litserve  # type: ignore[import-not-found, unused-ignore]
from fastapi import Body  # type: ignore[import-not-found, unused-ignore]

from benchmarks.rivals_http.torch_classifier import PATH, READY_PATH, TorchClassifier

if TYPE_CHECKING:
    import torch

BATCH = 8
BATCH_TIMEOUT = 0.05
"""Seconds that a batch waits to be full: what LitServe's documentation has in its example."""


class Classify(litserve.LitAPI):  # type: ignore[misc, unused-ignore]
    """The steps of one request."""

    def __init__(self, checkpoint: Path, threads: int, **options: Any) -> None:
        super().__init__(**options)
        self._checkpoint = checkpoint
        self._threads = threads

    def setup(self, device: str) -> None:
        self._model = TorchClassifier(self._checkpoint, self._threads)

    def decode_request(self, request):  # type: ignore[no-untyped-def]
        return self._model.read(request)

    def predict(self, x: torch.Tensor) -> list[dict[str, Any]]:
        return self._model.answers(x)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output):  # type: ignore[no-untyped-def]
        return output


# Said here and not in the signature: LitServe reads the annotation itself, which
# `from __future__ import annotations` would have made a string.
Classify.decode_request.__annotations__["request"] = Annotated[bytes, Body()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rivals_http.litserve_server")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2, help="torch's of one worker")
    parser.add_argument("--workers", type=int, default=1, help="processes that run the model")
    options = parser.parse_args()
    api = Classify(
        options.checkpoint,
        options.threads,
        max_batch_size=BATCH,
        batch_timeout=BATCH_TIMEOUT,
        api_path=PATH,
    )
    server = litserve.LitServer(
        api,
        accelerator="cpu",
        workers_per_device=options.workers,
        healthcheck_path=READY_PATH,
        timeout=False,
    )
    server.run(host="127.0.0.1", port=options.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
