"""The log: one line a record in either form, with what an operator needs and nothing of callers."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dermaflux.errors import BundleError, EngineError, ImageError, RequestError
from serving.keys import line, made
from serving.logs import (
    FIELDS,
    MAX_CAUSES,
    MAX_PLACES,
    TALKATIVE,
    AccessLog,
    Seldom,
    _Json,
    _Text,
    outline,
)
from tests.serving.live import running
from tests.serving.test_generate import error

ROOT = Path(__file__).resolve().parents[2]
MARK = "Muster-Erika-1964"
LESION = {"lesion": {"label": "benign"}, "steps": 1}

# As a process of the service: every handler there is, and every level.
LOUD = """
import asyncio, gc, io, logging, sys, threading
from pathlib import Path
logging.basicConfig(stream=sys.stdout, level=logging.DEBUG)
logging.getLogger("bentoml").addHandler(logging.StreamHandler(sys.stdout))
from PIL import Image, PngImagePlugin
from serving.logs import configure
from tests.serving.live import running
form, mark, folder = sys.argv[1:]
configure(form)
logging.getLogger("serving").setLevel(logging.DEBUG)

text = PngImagePlugin.PngInfo()
text.add_text("comment", mark)
stream = io.BytesIO()
exif = Image.Exif()
exif[270] = mark
Image.new("RGB", (96, 80)).save(stream, "PNG", pnginfo=text, exif=exif)
picture = {"image": (mark + ".png", stream.getvalue(), "image/png")}
everywhere = {"user-agent": mark, "x-request-id": "a " + mark, "cookie": mark}
free = ("generate", "classify", "free-text")
for fails in (None, ValueError(mark)):
    kept = {"audit": Path(folder, "audit"), "audit_key": Path(folder, "seal/key")}
    with running(
        fails=fails, anonymous_roles=free, marks=Path(folder, "marks"), audit_fsync="never", **kept
    ) as live:
        def ask(method, path, headers=None, **more):
            headers = everywhere | (headers or {})
            return live.client.request(method, path, headers=headers, **more).status_code
        body = {"prompt": mark, "steps": 1}
        found = [ask("POST", "/v1/generate", json=body)]
        found += [ask("POST", "/v1/generate/stream", json=body, params={"q": mark})]
        found += [ask("POST", "/v1/classify", files=picture, params={"q": mark})]
        found += [ask("POST", "/v1/classify", content=mark, headers={"content-type": "image/png"})]
        found += [ask("POST", "/v1/verify", files=picture, params={"q": mark})]
        found += [ask("POST", "/v1/verify", content=mark, headers={"content-type": "image/png"})]
        found += [ask("POST", "/v1/generate", json={"lesion": {"label": mark}, mark: mark})]
        found += [ask("GET", "/" + mark, params={"q": mark}), ask(mark, "/v1/model")]
        first = 200 if fails is None else 500
        assert found == [first, 200, 200, 400, 200, 400, 422, 404, 405], found

class Lost:
    def __del__(self):
        raise KeyError(mark)

def thread():
    raise KeyError(mark)

async def task():
    asyncio.create_task(lost(mark))
    await asyncio.sleep(0)

async def lost(argument):
    raise KeyError(argument)

Lost()
beside = threading.Thread(target=thread)
beside.start()
beside.join()
asyncio.run(task())
gc.collect()
raise KeyError(mark)
"""


@pytest.mark.parametrize("form", ["text", "json"])
def test_nothing_of_a_request_is_in_any_line(form: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOUD, form, MARK, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert MARK not in done.stdout + done.stderr
    for file in (file for file in tmp_path.rglob("*") if file.is_file()):
        assert MARK.encode() not in file.read_bytes()
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    told = done.stdout
    assert "POST /v1/generate 200" in told
    assert "POST /v1/generate 500" in told
    assert "other other 405" in told or "other /v1/model 405" in told
    # What failed can be found all the same: by place, by type and by request.
    assert "ValueError" in told
    assert "live.py" in told
    assert told.count("nobody caught this") == 3
    assert "Task exception was never retrieved" in told
    if form == "json":
        assert all(json.loads(one)["level"] for one in told.splitlines())


def written(formatter: logging.Formatter, message: str = "done", **more: object) -> str:
    record = logging.LogRecord("serving.x", logging.INFO, "x.py", 1, message, (), None)
    record.__dict__.update(more)
    return formatter.format(record)


def test_json_record_has_its_facts_and_is_one_line() -> None:
    told = written(_Json(), 'a "b"\n\u2028c', request="r1", caller="ward3", status=200)
    assert "\n" not in told
    assert told.isascii()
    facts = json.loads(told)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", facts["time"])
    assert (facts["level"], facts["logger"]) == ("INFO", "serving.x")
    assert facts["message"] == 'a "b"\n\u2028c'
    assert (facts["request"], facts["caller"], facts["status"]) == ("r1", "ward3", 200)
    assert "route" not in facts


def test_text_record_is_one_line_whatever_it_holds() -> None:
    told = written(_Text(), "a\nFAKE 2026 INFO\r\x1b[31m\u2028b", request="r1")
    assert len(told.splitlines()) == 1
    assert "\x1b" not in told
    assert told.endswith(r"INFO serving.x a\nFAKE 2026 INFO\r\x1b[31m\u2028b request=r1")


def test_records_of_others_are_one_line() -> None:
    record = logging.LogRecord("asyncio", logging.ERROR, "", 1, f"lost\n<Task {MARK}>", (), None)
    for formatter in (_Json(), _Text()):
        assert "lost" in formatter.format(record)
        assert MARK not in formatter.format(record)


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as caught:
        return caught


def test_outline_tells_places_and_types_and_not_what_was_sent() -> None:
    told = outline(raised(KeyError(MARK), raised(RequestError("prompt", MARK))))
    assert MARK not in told
    assert told.index("RequestError") < told.index("which led to") < told.index("KeyError")
    assert told.count("test_logs.py") == 2
    group = ExceptionGroup(MARK, [raised(ValueError(MARK)), raised(ImageError(MARK))])
    told = outline(raised(group))
    assert MARK not in told
    assert all(name in told for name in ("ValueError", "ImageError", "ExceptionGroup"))


def test_outline_tells_what_machines_say() -> None:
    assert outline(EngineError("no memory")) == "EngineError: no memory"
    assert outline(BundleError("no bundle")) == "BundleError: no bundle"
    assert outline(OSError(28, "No space left on device", MARK)) == (
        "OSError: No space left on device"
    )


def test_outline_ends() -> None:
    def deeper() -> None:
        deeper()

    with pytest.raises(RecursionError) as caught:
        deeper()
    assert len(outline(caught.value).splitlines()) == MAX_PLACES + 1
    first, second = ValueError(), KeyError()
    first.__context__, second.__context__ = second, first
    assert outline(first).count("which led to") == MAX_CAUSES


def test_request_leaves_one_line_with_its_caller_and_route(
    caplog: pytest.LogCaptureFixture,
) -> None:
    key, entry = made("ward3", ["generate"])
    with (
        caplog.at_level(logging.INFO, "serving.requests"),
        running(keys_inline=line(entry)) as live,
    ):
        headers = {"x-api-key": key, "x-request-id": "visit-7"}
        reply = live.client.post("/v1/generate?q=1", json=LESION, headers=headers)
        assert reply.headers.get_list("x-request-id") == ["visit-7"]
        refused = live.client.post("/v1/generate", json=LESION)
        live.client.get("/static/main.js")
        live.client.get("/readyz")
    lines = [vars(one) for one in caplog.records if one.name == "serving.requests"]
    facts = [tuple(one[name] for name in FIELDS if name != "seconds") for one in lines]
    assert facts[:2] == [
        ("visit-7", "ward3", "POST", "/v1/generate", 200),
        (refused.headers["x-request-id"], "-", "POST", "/v1/generate", 401),
    ]
    assert facts[2][1:] == ("-", "GET", "/static", 200)
    assert len(facts) == 3
    # To the millisecond: a file, or a refusal, may take none.
    assert all(0 <= one["seconds"] < 30 for one in lines)
    assert lines[0]["seconds"] > 0


def test_failure_is_logged_under_the_id_that_the_caller_gets(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running(fails=ValueError(MARK)) as live:
        reply = live.client.post("/v1/generate", json=LESION)
    assert reply.status_code == 500
    failed = [one for one in caplog.records if one.exc_info and one.name == "serving.replies"]
    assert {vars(one)["request"] for one in failed} == {error(reply)["request_id"]}


def test_debug_levels_do_not_reach_parsers() -> None:
    assert {"PIL", "python_multipart", "asyncio"} <= set(TALKATIVE)


def test_other_protocols_pass() -> None:
    import asyncio

    seen: list[object] = []

    async def app(scope: object, *_: object) -> None:
        seen.append(scope)

    asyncio.run(AccessLog(app)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == [{"type": "lifespan"}]


TWICE = """
import logging, sys
from bentoml._internal.log import configure_server_logging
from serving.logs import configure
configure_server_logging()
configure("text")
for number in range(30):
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
logging.getLogger("uvicorn.error").error("an error")
logging.getLogger("bentoml").warning("another's")
"""


def test_strangers_cannot_fill_the_log() -> None:
    """A line that is no HTTP leaves one line, not two, and a thousand of them ten a minute."""
    done = subprocess.run([sys.executable, "-c", TWICE], cwd=ROOT, capture_output=True, text=True)
    told = done.stdout + done.stderr
    assert told.count("Invalid HTTP request received.") == 10, told
    assert (told.count("an error"), told.count("another's")) == (1, 1)


def test_what_was_held_back_is_counted() -> None:
    seldom = Seldom(most=2)

    def written(at: float) -> str | None:
        record = logging.LogRecord("x", logging.WARNING, "", 0, "noise %d", (1,), None)
        record.created = at
        return record.getMessage() if seldom.filter(record) else None

    found = [written(at) for at in (1000, 1001, 1002, 1003, 1061, 900)]
    assert found == ["noise 1", "noise 1", None, None, "noise 1 (2 more before)", "noise 1"]
