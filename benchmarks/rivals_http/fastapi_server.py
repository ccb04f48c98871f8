"""FastAPI over a torch model, as its documentation does it: one worker, the endpoint a plain `def`.

    python -m benchmarks.rivals_http.fastapi_server --checkpoint runs/b16 --port 8001

FastAPI runs a plain `def` in its pool of threads, so requests are decoded beside each other. What
runs the model is one of two things that users do: with `--at-once 1` a lock, and every image gets
all of torch's threads; with more, so many images at a time with fewer threads each.

Source: FastAPI's documentation, "Concurrency and async / await" (path operation functions) and
"Lifespan Events" (loading a shared model).
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Body, FastAPI  # type: ignore[import-not-found, unused-ignore]

from benchmarks.rivals_http.torch_classifier import PATH, READY_PATH, TorchClassifier


def app(checkpoint: Path, threads: int, at_once: int) -> FastAPI:
    """The application; the model is opened when it starts."""
    models: dict[str, TorchClassifier] = {}
    turns = threading.Semaphore(at_once)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        models["classifier"] = TorchClassifier(checkpoint, threads)
        yield
        models.clear()

    made = FastAPI(lifespan=lifespan)

    @made.post(PATH)  # type: ignore[untyped-decorator, unused-ignore]
    def classify(image: Annotated[bytes, Body()]) -> dict[str, Any]:
        model = models["classifier"]
        tensor = model.read(image)
        with turns:
            (answer,) = model.answers(tensor[None])
        return answer

    @made.get(READY_PATH)  # type: ignore[untyped-decorator, unused-ignore]
    def health() -> dict[str, str]:
        return {"status": "ok"}

    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rivals_http.fastapi_server")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2, help="torch's within an operator")
    parser.add_argument("--at-once", type=int, default=1, help="images in the model at a time")
    options = parser.parse_args()
    uvicorn.run(
        app(options.checkpoint, options.threads, options.at_once),
        host="127.0.0.1",
        port=options.port,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
