from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import cold_start
from benchmarks.cold_start import Settings
from benchmarks.http_sides import PORT, Side
from dermaflux.bundle import Bundle
from dermaflux.errors import DermaFluxError, EngineError

SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        asked = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(503 if b'"steps": 9' in asked else 200); self.end_headers()
        self.wfile.write(b"a picture")

HTTPServer(("127.0.0.1", int(sys.argv[1])), Answers).serve_forever()
"""


def test_starts_are_counted_from_outside_and_split_from_inside(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cold.json"
    words = ["--bundle", str(tiny_bundle.path), "--starts", "1", "--steps", "2", "--no-service"]
    assert cold_start.main([*words, "--fail-over", "100", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert captured.err.count("warm-up") == 4
    assert {kind: len(starts) for kind, starts in result["each"].items()} == {
        "generate": 1, "generate, by stage": 1, "classify": 1, "classify, by stage": 1
    }  # fmt: skip
    whole = result["medians"]["generate"]
    assert 0.05 < whole["written_s"] <= whole["ended_s"]
    assert result["first_image_s"] == whole["written_s"]
    for kind in ("generate, by stage", "classify, by stage"):
        stages = dict(result["each"][kind][0])
        assert sum(stages.values()) - stages["total_s"] == pytest.approx(stages["total_s"])
        assert min(stages.values()) > 0


def test_a_slow_start_is_status_1(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = {"generate": [{"written_s": 4.0}, {"written_s": 2.0}, {"written_s": 9.0}]}
    monkeypatch.setattr(cold_start, "measure", lambda *_: starts)
    words = ["--bundle", str(tiny_bundle.path)]
    assert cold_start.main([*words, "--fail-over", "3.9"]) == 1
    assert cold_start.main([*words, "--fail-over", "4"]) == 0


def test_a_server_is_timed_until_its_first_picture(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    side = Side("tiny", (sys.executable, str(tmp_path / "server.py"), PORT), {}, "/readyz")
    spent = cold_start.service(Settings(), side, tmp_path)
    assert 0 < spent["image_s"] < spent["total_s"]
    assert spent["total_s"] == pytest.approx(spent["ready_s"] + spent["image_s"])
    with pytest.raises(DermaFluxError, match="answered 503: a picture"):
        cold_start.service(Settings(steps=9), side, tmp_path)


def test_a_command_that_fails_is_an_error_with_its_words() -> None:
    with pytest.raises(EngineError, match="no such day"):
        cold_start.ran([sys.executable, "-c", "raise SystemExit('no such day')"])


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--starts", "0"], "--starts 0"), (["--precision", "fp4"], "fp4"), (["--engine", "x"], "x")],
)
def test_what_cannot_be_started_is_one_sentence(
    tiny_bundle: Bundle, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cold_start.main(["--bundle", str(tiny_bundle.path), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_caches_that_may_not_be_dropped_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold_start, "_DROP", tmp_path / "none/drop_caches")
    monkeypatch.setattr("os.sync", lambda: None)
    with pytest.raises(DermaFluxError, match="as root"):
        cold_start.drop_caches()
