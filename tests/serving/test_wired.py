"""What the service records of each request, what it refuses to start with, what it tells of it."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from PIL import Image

from dermaflux.bundle import Bundle
from dermaflux.checkpoint import UNKNOWN_LICENCE
from dermaflux.errors import BundleError, DermaFluxError
from dermaflux.licence import LicenceError
from dermaflux.marks.certificates import MarksError
from export.__main__ import require_allowed as exported
from serving import records
from serving.access import Access
from serving.app import witnesses
from serving.audit import log as writing
from serving.audit.anchors import logged_anchors
from serving.audit.ending import files_of
from serving.audit.log import AuditLog
from serving.audit.record import MAX_RESULTS, answer_hash
from serving.audit.secret import AuditError, Secrets
from serving.audit.verifying import verify
from serving.batch.asked import require_allowed as drawn
from serving.batch.thresholds import Thresholds
from serving.doctor.report import Report
from serving.keys import line, made
from serving.readiness import Readiness
from serving.scorer import opened
from serving.settings import SettingError, Settings
from serving.standing import Doctor
from serving.starting import starting
from tests.serving.live import Live, picture, running
from tests.serving.test_generate import PROMPT, error, events
from tests.serving.test_service import checked
from tests.tiny_bundle import write_bundle

WARD, OPERATOR = made("ward", ["generate", "classify"]), made("operator", ["admin"])
LINES = "\n".join(line(entry) for _, entry in (WARD, OPERATOR))
KEY = {"x-api-key": WARD[0]}
ASK = {"prompt": PROMPT, "seed": 7, "steps": 2}
PNG = {"content-type": "image/png"}


@pytest.fixture
def kept(tmp_path: Path) -> dict[str, Any]:
    """Settings of an audit log."""
    return {
        "audit": tmp_path / "audit",
        "audit_key": tmp_path / "seal/audit.key",
        "audit_fsync": "never",
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    data = b"".join(file.read_bytes() for file in files_of(folder))
    assert b"dermoscopic" not in data
    found = [json.loads(one) for one in data.splitlines()]
    return [one for one in found if one["event"] == "request"]


def facts(one: dict[str, Any]) -> tuple[Any, ...]:
    return one.get("caller"), one["route"], one["outcome"], one.get("status")


def test_each_request_leaves_a_line_with_its_results(kept: dict[str, Any]) -> None:
    with running(keys_inline=LINES, **kept) as live:

        def ask(path: str, **more: Any) -> Any:
            return live.client.post(path, headers={**KEY, **more.pop("headers", {})}, **more)

        image = ask("/v1/generate", json={**ASK, "n": 2}, headers={"accept": "multipart/mixed"})
        answer = ask("/v1/classify", content=picture(200), headers=PNG).json()
        form = [("image", ("Erika.png", data, "image/png")) for data in (picture(9), b"x")]
        several = ask("/v1/classify/batch", files=form).json()["results"]
        verdict = ask("/v1/verify", content=picture(200), headers=PNG).json()
        ask("/v1/generate", json={**ASK, "n": 900})
        ask("/v1/images/generations", json=ASK)
        live.client.post("/v1/classify", content=b"x", headers=PNG)
        live.client.get("/metrics", headers=KEY)
        live.client.get("/readyz")
        live.client.get("/nowhere")
        live.client.get("/v1/model?name=Erika", headers={"x-api-key": OPERATOR[0]})
    found = lines(kept["audit"])
    assert [facts(one) for one in found] == [
        ("ward", "/v1/generate", "done", 200),
        ("ward", "/v1/classify", "done", 200),
        ("ward", "/v1/classify/batch", "done", 200),
        ("ward", "/v1/verify", "done", 200),
        ("ward", "/v1/generate", "refused", 422),
        ("ward", "/v1/images/generations", "done", 200),
        (None, "/v1/classify", "refused", 401),
        ("ward", "/metrics", "refused", 403),
        ("operator", "/v1/model", "done", 200),
    ]
    results = [one.get("results") for one in found]
    assert len(results[0]) == 2
    assert results[0][0] == image.content.partition(b"X-DermaFlux-Pixels-SHA256: ")[2][:64].decode()
    assert results[1] == [answer_hash(answer)]
    assert results[2] == [answer_hash(several[0]["result"])]
    assert results[3] == [answer_hash(verdict)]
    assert results[5] == results[0][:1]
    assert {one["bundle"] for one in found} == {"0123456789abcdef"}
    assert "address" not in found[0]
    assert "Erika" not in str(found)
    assert verify(files_of(kept["audit"]), Secrets.open(kept["audit_key"]), []).holds


def test_addresses_are_recorded_where_that_is_asked_for(kept: dict[str, Any]) -> None:
    with running(audit_addresses=True, **kept) as live:
        live.client.get("/v1/queue")
    assert [one["address"] for one in lines(kept["audit"])] == ["127.0.0.1"]


def streamed(live: Live, path: str = "/v1/generate/stream", **more: Any) -> list[Any]:
    with live.client.stream("POST", path, json={**ASK, **more}) as reply:
        return list(events(reply))


def test_streams_are_recorded_image_by_image(kept: dict[str, Any]) -> None:
    with running(**kept) as live:
        told = streamed(live, n=2)
        streamed(live, "/v1/images/generations", stream=True)
    assert [name for name, _ in told].count("image") == 2
    first, second, third = lines(kept["audit"])
    assert facts(first) == (first["caller"], "/v1/generate/stream", "done", 200)
    assert first["results"] != second["results"]
    assert third["results"] == first["results"]


def test_streams_that_fail_say_so_in_the_log(kept: dict[str, Any]) -> None:
    with running(fails=RuntimeError("Erika"), **kept) as live:
        assert streamed(live)[-1][0] == "error"
        assert live.client.post("/v1/generate", json=ASK).status_code == 500
    assert [one["outcome"] for one in lines(kept["audit"])] == ["internal", "failed"]


def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the log takes nothing."""

    def write(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AuditLog, "_put", write)


def test_nothing_goes_out_that_is_not_recorded(
    kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(**kept) as live:
        refused(monkeypatch)
        for path, more in {
            "/v1/generate": {"json": ASK},
            "/v1/classify": {"content": picture(200), "headers": PNG},
            "/v1/verify": {"content": picture(200), "headers": PNG},
        }.items():
            reply = live.client.post(path, **more)  # type: ignore[arg-type]
            assert (reply.status_code, error(reply)["code"]) == (503, "not_ready")
            assert reply.headers["retry-after"] == "60"
        told = streamed(live)
        assert "image" not in [name for name, _ in told]
        assert (told[-1][0], told[-1][1]["error"]["code"]) == ("error", "not_ready")
        assert "has to be recorded" in told[-1][1]["error"]["message"]
        monkeypatch.setattr(writing, "ROOM", 2**70)
        steps = live.brake.steps
        assert live.client.post("/v1/generate", json=ASK).status_code == 503
        assert live.brake.steps == steps, "work was begun that could not be recorded"


def test_where_the_log_is_not_required_answers_go_out(
    kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(audit_required=False, **kept) as live:
        with monkeypatch.context() as patch:
            refused(patch)
            assert live.client.post("/v1/generate", json=ASK).status_code == 200
            assert streamed(live)[-1][0] == "image"
        live.client.get("/v1/queue")
    assert len(lines(kept["audit"])) == 1


def test_who_asks_while_engines_load_is_recorded(
    kept: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(keys_inline=LINES, **kept)
    opened = records.Records.open(settings, "0" * 16)
    told = witnesses(opened, Access.of(settings), "0" * 16, settings)
    transport = httpx.ASGITransport(starting(Readiness(), told))

    async def ask(method: str, path: str, **headers: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.request(method, path, headers=headers)

    def status(method: str, path: str, **headers: str) -> tuple[int, str]:
        reply = asyncio.run(ask(method, path, **headers))
        return reply.status_code, reply.headers["retry-after"]

    for method, path in [("POST", "/v1/generate"), ("GET", "/v1/queue"), ("GET", "/readyz")]:
        assert status(method, path, **KEY) == (503, "2")
    assert status("POST", "/v1/classify") == (503, "2")
    assert status("POST", "/v1/John-Smith") == (503, "2")
    assert [facts(one) for one in lines(kept["audit"])] == [
        ("ward", "/v1/generate", "failed", 503),
        ("ward", "/v1/queue", "failed", 503),
        (None, "/v1/classify", "failed", 503),
    ]
    refused(monkeypatch)
    assert status("POST", "/v1/generate", **KEY) == (503, "60")
    opened.close()


def test_the_end_leaves_an_anchor(
    kept: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "serving.audit.log"), running(**kept) as live:
        live.client.get("/v1/queue")
        last = files_of(kept["audit"])[-1].read_bytes().splitlines()[-1]
    told = tmp_path / "service.log"
    told.write_text("\n".join(record.getMessage() for record in caplog.records))
    anchors = logged_anchors(told)
    assert verify(files_of(kept["audit"]), Secrets.open(kept["audit_key"]), anchors).holds
    assert f"anchor {json.loads(last)['n']}:" in told.read_text()


def test_more_results_than_a_line_takes_are_several_lines() -> None:
    told: list[list[str]] = []

    class Reply:
        async def record(self, outcome: str, results: list[str]) -> None:
            told.append(results)

    request: Any = SimpleNamespace(state=SimpleNamespace(audited=Reply()))
    hashes = [f"{number:064x}" for number in range(2 * MAX_RESULTS + 3)]
    asyncio.run(records.note(request, hashes))
    assert [len(part) for part in told] == [MAX_RESULTS, MAX_RESULTS]
    assert [*told[0], *told[1], *request.state.results] == hashes


def fails(bundle: Bundle, kind: type[DermaFluxError], **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        records.check(Settings(**settings), bundle)
    return str(caught.value)


def test_what_cannot_be_kept_stops_the_start(
    tiny_bundle: Bundle, tmp_path: Path, kept: dict[str, Any]
) -> None:
    (tmp_path / "file").touch()
    below = tmp_path / "file/below"
    assert "DERMAFLUX_AUDIT_KEY" in fails(tiny_bundle, SettingError, audit=tmp_path / "audit")
    assert "DERMAFLUX_MARKS" in fails(tiny_bundle, SettingError, watermark=True)
    assert str(below) in fails(tiny_bundle, AuditError, **{**kept, "audit": below})
    assert str(below) in fails(tiny_bundle, MarksError, marks=below)
    keys = tmp_path / "marks/keys"
    keys.mkdir(parents=True)
    (keys / "key.pem").write_text("no key")
    assert "backup" in fails(tiny_bundle, MarksError, marks=tmp_path / "marks")
    records.check(Settings(**kept), tiny_bundle)
    kept["audit_key"].unlink()
    assert "there is no key of the audit log" in fails(tiny_bundle, AuditError, **kept)


def test_a_check_leaves_nothing_open(
    tiny_bundle: Bundle, tmp_path: Path, kept: dict[str, Any]
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    records.check(Settings(marks=tmp_path / "marks", **kept), tiny_bundle)
    assert len(os.listdir("/proc/self/fd")) == before
    # What is begun there is what the service goes on with.
    with running(marks=tmp_path / "marks", **kept) as live:
        live.client.get("/v1/queue")
    events_of = [json.loads(one) for one in files_of(kept["audit"])[0].read_bytes().splitlines()]
    assert [one["event"] for one in events_of] == ["begun", "request"]


@pytest.fixture
def mixed(tmp_path: Path) -> Bundle:
    """A bundle whose classifier may not be used for money."""
    folder = write_bundle(tmp_path / "mixed")
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["provenance"]["ingredients"] = [
        {"name": "HAM10000", "licence": "CC-BY-NC-4.0", "used_for": "classifier"}
    ]
    (folder / "bundle.json").write_text(json.dumps(manifest))
    return Bundle.open(folder)


def test_a_bundle_that_the_policy_forbids_does_not_start(
    mixed: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checked(mixed.path, monkeypatch) is None
    words = checked(mixed.path, monkeypatch, POLICY="commercial")
    assert words is not None
    assert words.startswith("error: the policy commercial refuses: HAM10000")
    assert words.endswith("DERMAFLUX_CLASSIFIER=0 leaves it out")
    assert checked(mixed.path, monkeypatch, POLICY="commercial", CLASSIFIER="0") is None
    words = checked(mixed.path, monkeypatch, POLICY="comercial")
    assert words is not None
    assert "comercial" in words


def test_a_classifier_that_is_left_out_is_not_loaded(mixed: Bundle) -> None:
    with pytest.raises(BundleError, match="left out by DERMAFLUX_CLASSIFIER=0"):
        opened(Settings(bundle=mixed.path, classifier=False))
    with running(classifies=False, classifier=False, policy="a/b/site.yaml") as live:
        reply = live.client.post("/v1/classify", content=picture(1), headers=PNG)
        assert (reply.status_code, error(reply)["code"]) == (404, "no_classifier")
        card = live.client.get("/v1/model").json()
        assert card["classifier"] is None
        assert card["kept"] == {
            "policy": "site.yaml", "audit": False, "signed": False, "watermark": False,
        }  # fmt: skip
        assert live.client.get("/readyz").status_code == 200


def test_the_batch_generator_asks_the_policy_for_what_it_uses(mixed: Bundle) -> None:
    drawn("research", mixed, Thresholds())
    with pytest.raises(LicenceError, match="--gate off"):
        drawn("commercial", mixed, Thresholds())
    drawn("commercial", mixed, None)


def test_the_export_asks_the_policy() -> None:
    def checkpoint(**provenance: Any) -> Any:
        return SimpleNamespace(path=Path("FLUX"), provenance={"name": "FLUX", **provenance})

    free = checkpoint(licence="Apache-2.0")
    exported(free, "commercial", ["transformer", "classifier"])
    with pytest.raises(LicenceError, match="CC-BY-NC-4.0"):
        exported(checkpoint(licence="CC-BY-NC-4.0"), "commercial", ["transformer"])
    with pytest.raises(LicenceError, match=r"write FLUX/provenance\.json with name and licence"):
        exported(checkpoint(licence=UNKNOWN_LICENCE), "research", ["transformer"])
    data = {"name": "HAM", "licence": "CC-BY-NC-4.0", "used_for": "classifier"}
    part = checkpoint(licence="Apache-2.0", ingredients=[data])
    exported(part, "commercial", ["transformer"])
    with pytest.raises(LicenceError, match="HAM"):
        exported(part, "commercial", ["transformer", "classifier"])


def doctors(live: Live, key: str | None) -> Any:
    headers = {} if key is None else {"x-api-key": key}
    return live.client.get("/v1/model", headers=headers).json()["doctor"]


def test_admins_see_what_the_doctor_says(tiny_bundle: Bundle, kept: dict[str, Any]) -> None:
    with running(keys_inline=LINES, bundle=tiny_bundle, **kept) as live:
        told = doctors(live, OPERATOR[0])
        assert doctors(live, WARD[0]) is None
        document = live.client.get("/openapi.json").json()
        card = live.client.get("/v1/model", headers={"x-api-key": OPERATOR[0]}).json()
        form = {"$ref": "#/components/schemas/ModelCard", "components": document["components"]}
        Draft202012Validator(form).validate(card)
    about = {one["about"]: one for one in told["findings"]}
    assert {"policy", "keys", "audit", "disk", "clock"} <= set(about)
    assert about["policy"]["state"] == "ok"
    assert told["healthy"] == all(one["state"] != "fail" for one in told["findings"])
    assert "files" not in about or "open files" in about["files"]["words"]


def test_strangers_see_no_report(tiny_bundle: Bundle) -> None:
    with running(bundle=tiny_bundle) as live:
        assert doctors(live, None)["findings"]
    with running(bundle=tiny_bundle, open=True) as live:
        assert doctors(live, None) is None


def examined(times: list[int], held: Callable[[], object] = lambda: None) -> Callable[[], Report]:
    def examine() -> Report:
        times.append(threading.get_ident())
        held()
        return Report("here", None, ())

    return examine


def test_a_report_is_remembered_for_a_while() -> None:
    times: list[int] = []
    now = [0.0]

    async def work() -> None:
        doctor = Doctor(examined(times), clock=lambda: now[0])
        await asyncio.gather(*(doctor.card() for _ in range(5)))
        now[0] += 4.9
        await doctor.card()
        assert len(times) == 1
        now[0] += 0.2
        assert (await doctor.card()).healthy  # type: ignore[union-attr]
        assert len(times) == 2
        assert threading.get_ident() not in times

    asyncio.run(work())


def test_a_report_that_takes_long_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.standing.PATIENCE_SECONDS", 0.01)
    times: list[int] = []
    hangs = threading.Event()

    async def work() -> None:
        doctor = Doctor(examined(times, lambda: hangs.wait(30)))
        assert await doctor.card() is None
        assert await doctor.card() is None
        assert len(times) == 1
        hangs.set()
        monkeypatch.setattr("serving.standing.PATIENCE_SECONDS", 30)
        assert (await doctor.card()).healthy  # type: ignore[union-attr]

    asyncio.run(work())


def test_settings_are_read() -> None:
    read = Settings.from_environment(
        {
            "DERMAFLUX_POLICY": "site.yaml",
            "DERMAFLUX_CLASSIFIER": "0",
            "DERMAFLUX_AUDIT": "/a",
            "DERMAFLUX_AUDIT_KEY": "/k",
            "DERMAFLUX_AUDIT_REQUIRED": "0",
            "DERMAFLUX_AUDIT_FSYNC": "always",
            "DERMAFLUX_AUDIT_ADDRESSES": "1",
            "DERMAFLUX_MARKS": "/m",
            "DERMAFLUX_WATERMARK": "1",
        }
    )
    assert read == Settings(
        policy="site.yaml", classifier=False, audit=Path("/a"), audit_key=Path("/k"),
        audit_required=False, audit_fsync="always", audit_addresses=True, marks=Path("/m"),
        watermark=True,
    )  # fmt: skip
    usual = Settings()
    assert (usual.policy, usual.classifier, usual.audit, usual.marks) == (
        "research", True, None, None,
    )  # fmt: skip
    assert (usual.audit_required, usual.audit_fsync, usual.watermark) == (True, "second", False)
    with pytest.raises(SettingError, match="DERMAFLUX_AUDIT_FSYNC is 'often'"):
        Settings.from_environment({"DERMAFLUX_AUDIT_FSYNC": "often"})


def test_pictures_have_no_place_in_the_log(kept: dict[str, Any], tmp_path: Path) -> None:
    with running(marks=tmp_path / "marks", **kept) as live:
        data = live.client.post("/v1/generate", json=ASK).content
        Image.open(io.BytesIO(data)).verify()
    size = sum(file.stat().st_size for file in kept["audit"].iterdir())
    assert size < 3_000
