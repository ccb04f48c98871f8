"""Run by a test, in a place where nothing may leave and little may be written: the whole service,
from its start through every route to its end. The last line on stdout is what happened, as JSON.

    python tests/serving/alone.py FOLDER KEY [MARK]

FOLDER is the only one that can be written to; MARK goes wherever a request can carry text.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

FOLDER, KEY, MARK = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
START_SECONDS = 120.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def unreachable() -> int:
    """Times that this network namespace was asked for a way to somewhere and had none."""
    names, figures = [
        line.split()
        for line in Path("/proc/net/snmp").read_text().splitlines()
        if line[:3] == "Ip:"
    ]
    old = int(dict(zip(names, figures, strict=True))["OutNoRoutes"])
    new = Path("/proc/net/snmp6").read_text().split()
    return old + int(new[new.index("Ip6OutNoRoutes") + 1])


def requests(client: httpx.Client, image: bytes) -> dict[str, int]:
    """Every route once as it is meant, and with marks where callers can put text."""
    lesion = {"lesion": {"label": "benign"}, "steps": 2}
    marked = {"prompt": f"benign {MARK}", "steps": 1}
    named = {"image": (f"{MARK}.png", image, "image/png")}
    headers = {"user-agent": MARK, "referer": f"http://localhost/{MARK}", "cookie": f"a={MARK}"}
    elsewhere = f"http://192.0.2.1/{MARK}.png"
    json_type = {"content-type": "application/json"}
    asked = {
        "generate": ("POST", "/v1/generate", {"json": lesion}),
        "stream": ("POST", "/v1/generate/stream", {"json": {**lesion, "previews": 1}}),
        "several": ("POST", "/v1/generate", {"json": {**lesion, "n": 2}}),
        "classify": ("POST", "/v1/classify", {"files": named, "params": {"q": MARK}}),
        "batch": ("POST", "/v1/classify/batch", {"files": [("image", named["image"])]}),
        "verify": ("POST", "/v1/verify", {"files": named, "params": {"q": MARK}}),
        "unverifiable": ("POST", "/v1/verify", {"files": {"image": (MARK, MARK.encode())}}),
        "model": ("GET", "/v1/model", {"params": {"a": MARK}}),
        "metrics": ("GET", "/metrics", {}),
        "page": ("GET", "/", {}),
        "document": ("GET", "/openapi.json", {}),
        "text": ("POST", "/v1/generate", {"json": marked}),
        "wrong": ("POST", "/v1/generate", {"json": {**lesion, MARK: 1}}),
        "broken": ("POST", "/v1/generate", {"content": f'{{"{MARK}', "headers": json_type}),
        "kind": ("POST", "/v1/generate", {"content": MARK, "headers": {"content-type": MARK}}),
        "junk": ("POST", "/v1/classify", {"files": {"image": (MARK, MARK.encode(), "image/png")}}),
        "address": ("POST", "/v1/classify", {"files": {"image": (None, elsewhere)}}),
        "nowhere": ("GET", f"/{MARK}", {"params": {MARK: MARK}}),
        "side": ("GET", "/schema.json", {}),
        "docs": ("GET", "/docs.json", {}),
        "side door": ("POST", "/score", {"json": {"photographs": []}}),
        "method": ("DELETE", "/v1/model", {}),
    }
    told = {}
    for name, (method, path, more) in asked.items():
        more = {**more, "headers": {**headers, **more.get("headers", {})}}
        told[name] = client.request(method, path, **more).status_code  # type: ignore[arg-type]
    wrong = httpx.get(f"{client.base_url}/v1/model", headers={"x-api-key": MARK})
    return {**told, "wrong key": wrong.status_code}


def main() -> None:
    port = free_port()
    log = FOLDER / "log.txt"
    before = unreachable()
    command = [sys.executable, "-m", "bentoml", "serve", "serving.service:DermaFlux"]
    with log.open("wb") as stream:
        service = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=stream, stderr=stream
        )
        try:
            told = talk(f"http://127.0.0.1:{port}", service)
        finally:
            service.send_signal(signal.SIGTERM)
            status = service.wait(60)
    print(json.dumps({**told, "status": status, "unreachable": unreachable() - before}))


def talk(address: str, service: subprocess.Popen[bytes]) -> dict[str, object]:
    end = time.monotonic() + START_SECONDS
    image = (FOLDER / "image.png").read_bytes()
    with httpx.Client(
        base_url=address, trust_env=False, timeout=30, headers={"authorization": f"Bearer {KEY}"}
    ) as client:
        while True:
            assert service.poll() is None, "the service has ended"
            assert time.monotonic() < end, "the service does not get ready"
            try:
                if client.get("/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        return {"user": os.getuid(), "replies": requests(client, image)}


if __name__ == "__main__":
    main()
