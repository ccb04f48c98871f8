"""Sides over HTTP: how they are started and ended, what rates mean, and the whole command."""

from __future__ import annotations

import io
import json
import socket
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import http_classify, processes
from benchmarks.answers import Answer
from benchmarks.asks import photograph
from benchmarks.classify_rate import SIZE
from benchmarks.http_contenders import contenders
from benchmarks.http_figures import single_server_tail
from benchmarks.http_ours import IN_PROCESS, OURS, Kind, kinds
from benchmarks.http_rounds import rate_of
from benchmarks.http_sides import HOST, PORT, Side, free_port, started, watched
from benchmarks.rivals_http.torch_classifier import PATH, READY_PATH, TorchClassifier
from dermaflux.bundle import Bundle, ClassifierSpec
from dermaflux.classifier import preprocess
from dermaflux.errors import BundleError, DermaFluxError, EngineError
from tests.tiny_bundle import write_bundle

ROOT = Path(__file__).resolve().parents[2]
SERVER = textwrap.dedent(
    """
    import json, subprocess, sys, threading, time
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    turn, seconds = threading.Lock(), float(sys.argv[2])
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.tell({"child": child.pid})

        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            with turn:
                time.sleep(seconds)
            self.tell({"decision": "benign", "probability": 0.25})

        def tell(self, told):
            body = json.dumps(told).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
    """
)
"""A server that takes so long for each photograph, one after the other, and has a child."""


def side(name: str, seconds: float = 0.0) -> Side:
    return Side(name, (sys.executable, "-c", SERVER, PORT, str(seconds)), {}, READY_PATH)


def test_a_side_is_asked_while_it_runs_and_ends_with_all_that_it_started(tmp_path: Path) -> None:
    with started(side("fake"), tmp_path / "log") as running, watched(running):
        assert running.url.startswith(f"http://{HOST}:")
        assert running.start_s > 0
        family = processes.family([running.pid])
        assert len(family) == 2
        assert running.cpu_s() > 0
    assert running.peak_rss_bytes > 2e6
    assert processes.seen(family).processes == 0


def test_a_side_that_dies_while_it_starts_has_last_words(tmp_path: Path) -> None:
    dying = Side("fake", (sys.executable, "-c", "raise SystemExit('no weights here')"), {}, "/")
    with (
        pytest.raises(DermaFluxError, match=r"(?s)fake ended with status 1 .*no weights here"),
        started(dying, tmp_path / "log"),
    ):
        pass
    lacking = Side("fake", ("/nowhere/python",), {}, "/")
    with (
        pytest.raises(DermaFluxError, match="/nowhere/python cannot be run"),
        started(lacking, tmp_path / "log"),
    ):
        pass


def test_a_port_that_is_taken_is_told_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        port = listener.getsockname()[1]
        with (
            pytest.raises(DermaFluxError, match=f"port {port} .* use another --port"),
            started(side("fake"), tmp_path / "log", port),
        ):
            pass
    assert free_port(port) == port


def test_a_rate_does_not_depend_on_where_batches_end() -> None:
    """16 callers in batches of 8, each of which takes a second: 8 a second, wherever one looks."""
    answers = [
        Answer(
            due=turn + half, sent=turn + half, ended=turn + half + 2.0, status=200, caller=caller
        )
        for caller in range(16)
        for half in [caller // 8]
        for turn in range(0, 6, 2)
    ]
    assert rate_of(answers) == pytest.approx(8.0)
    lost = [Answer(one.due, one.sent, one.ended, 503, caller=one.caller) for one in answers[:3]]
    assert rate_of([*lost, *answers[3:]]) == pytest.approx(8.0 * 15 / 16)


def test_the_tail_of_queueing_alone() -> None:
    """Next to nothing under way: nobody waits. At half load: as Crommelin's formula gives it."""
    assert single_server_tail(0.001) == pytest.approx(1.0, abs=0.01)
    # Half wait for nobody, so p50 is close to 1; P(wait > 3.3) is one in a hundred (Erlang's tail,
    # exponent 1.256, from 0.5 (e^x - 1) = x).
    assert single_server_tail(0.5) == pytest.approx(4.3, rel=0.05)


def settings(**given: Any) -> http_classify.Settings:
    return http_classify.Settings(**given)


PLAIN = Kind(Path("bundle"), None, None, None, "openvino-cpu int8")


def test_one_of_ours_is_what_the_service_takes_by_itself(tiny_bundle: Bundle) -> None:
    (one,) = kinds(settings(bundle=tiny_bundle.path), tiny_bundle)
    assert (one.side, one.alone, one.goal, one.lossy) == (OURS, IN_PROCESS, "", False)
    service = one.service()
    assert service.name == f"{OURS}, {one.runs}"
    assert service.variables["DERMAFLUX_BUNDLE"] == str(tiny_bundle.path)
    assert not {"DERMAFLUX_PRECISION", "DERMAFLUX_CLASSIFIER_TIER"} & set(service.variables)
    assert one.words() == ["--bundle", str(tiny_bundle.path)]


def test_several_of_ours_are_named_by_what_was_asked_for(tiny_bundle: Bundle) -> None:
    asked = settings(bundle=tiny_bundle.path, precision=("int8", "fp32"), tier=("lossless",))
    found = kinds(asked, tiny_bundle)
    assert [one.side for one in found] == [f"{OURS}, int8", f"{OURS}, fp32",
                                           f"{OURS}, tier lossless"]  # fmt: skip
    assert len({one.alone for one in found}) == 3
    assert [one.runs.split()[1] for one in found] == ["int8", "fp32", "fp32"]
    assert found[0].service().variables["DERMAFLUX_PRECISION"] == "int8"
    assert found[2].service().variables["DERMAFLUX_CLASSIFIER_TIER"] == "lossless"
    assert found[2].words()[-2:] == ["--tier", "lossless"]
    for wrong in ({"precision": ("int3",)}, {"tier": ("pruned",)}, {"tier": ("fastest",)}):
        with pytest.raises(EngineError):
            kinds(settings(bundle=tiny_bundle.path, **wrong), tiny_bundle)


def test_what_does_less_work_is_named_lossy() -> None:
    pruned = Kind(Path("bundle"), None, None, "pruned", "openvino-cpu int8-pruned")
    assert pruned.lossy
    assert pruned.goal == "tier pruned (lossy): "
    assert not PLAIN.lossy


def test_rivals_are_left_out_with_a_reason(tmp_path: Path) -> None:
    families, left_out = contenders(settings(), [PLAIN])
    assert list(families) == [OURS]
    assert set(left_out) == {"litserve", "fastapi"}
    assert "--checkpoint" in left_out["fastapi"]
    with pytest.raises(BundleError, match=r"classifier/model\.safetensors"):
        contenders(settings(checkpoint=tmp_path), [PLAIN])
    lacking = settings(checkpoint=ROOT / "models/mini", rivals_python=tmp_path / "python")
    families, left_out = contenders(lacking, [PLAIN])
    assert list(families) == [OURS]
    assert f"{tmp_path / 'python'} has no litserve" in left_out["litserve"]


def test_torch_is_shown_the_same_pixels() -> None:
    """timm's transform and ours, of the committed checkpoint."""
    import torch

    rival = TorchClassifier(ROOT / "models/mini", threads=1)
    config = json.loads((ROOT / "models/mini/classifier/config.json").read_text())
    given, reading = config["pretrained_cfg"], config["dermaflux"]
    spec = ClassifierSpec(
        classes=tuple(config["label_names"]),
        input_size=tuple(given["input_size"]),
        mean=tuple(given["mean"]),
        std=tuple(given["std"]),
        interpolation=given["interpolation"],
        crop_pct=given["crop_pct"],
        temperature=reading["temperature"],
        threshold=reading["threshold"],
        abstain=tuple(reading["abstain"]),
    )
    data, _ = photograph(7, SIZE, "JPEG")
    tensor = rival.read(data)
    np.testing.assert_allclose(
        tensor.numpy(), preprocess(Image.open(io.BytesIO(data)), spec), atol=1e-6
    )
    one, other = rival.answers(torch.stack([tensor, tensor]))
    assert one == other
    assert (one["decision"] == "malignant") == (one["probability"] >= spec.threshold)


def test_the_whole_command_over_sides_of_known_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a rival's settings the best is taken; ratios are those of the seconds that are slept."""
    bundle = write_bundle(tmp_path / "bundle")
    families = {
        OURS: [side(OURS, 0.01)],
        "fastapi": [side("fastapi, slow", 0.08), side("fastapi, fast", 0.04)],
    }
    monkeypatch.setattr(
        http_classify, "contenders", lambda *_: (families, {"litserve": "litserve is not here"})
    )
    out = tmp_path / "out/result.json"
    status = http_classify.main(
        ["--bundle", str(bundle), "--rounds", "2", "--callers", "1,4", "--seconds", "0.6",
         "--few-seconds", "0.3", "--open-seconds", "0.6", "--warm-up", "0.1", "--out", str(out)]
    )  # fmt: skip
    printed = capsys.readouterr()
    assert status == 0, printed.err
    result = json.loads(printed.out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    sides = result["sides"]
    assert set(sides) == {OURS, "fastapi", IN_PROCESS}
    assert sides["fastapi"]["settings"] == "fastapi, fast"
    assert set(sides["fastapi"]["tried"]) == {"fastapi, slow", "fastapi, fast"}
    assert set(sides[OURS]["closed"]) == {"1", "4"}
    assert sides[OURS]["open"]["faults"] == {}
    assert result["ratios"]["times fastapi"]["low"] > 2
    assert result["left_out"] == {"litserve": "litserve is not here"}
    met = {one["goal"]: one["met"] for one in result["goals"]}
    assert met["at 4 callers, times litserve"] is None
    assert result["answers"]["from_reference"][OURS] == 0
    assert set(result["answers"]["from_in_process"]) == {OURS}
    assert "left out: litserve is not here" in printed.err


def test_each_of_ours_is_held_to_the_goals_beside_the_same_rivals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    names = [f"{OURS}, int8", f"{OURS}, fp32"]
    families = {
        names[0]: [side(names[0], 0.01)],
        names[1]: [side(names[1], 0.02)],
        "fastapi": [side("fastapi", 0.05)],
    }
    monkeypatch.setattr(http_classify, "contenders", lambda *_: (families, {}))
    status = http_classify.main(
        ["--bundle", str(bundle), "--precision", "int8,fp32", "--rounds", "1", "--callers", "2",
         "--seconds", "0.6", "--few-seconds", "0", "--open-seconds", "0", "--warm-up", "0.1"]
    )  # fmt: skip
    printed = capsys.readouterr()
    assert status == 0, printed.err
    result = json.loads(printed.out.splitlines()[-1])
    alone = [f"{IN_PROCESS}, int8", f"{IN_PROCESS}, fp32"]
    assert set(result["sides"]) == {*names, *alone, "fastapi"}
    assert [result["sides"][name]["precision"] for name in alone] == ["int8", "fp32"]
    ratios = result["ratios"]
    assert ratios["int8, times fastapi"]["median"] > ratios["fp32, times fastapi"]["median"] > 1.5
    goals = [one["goal"] for one in result["goals"]]
    assert "int8: at 2 callers, times fastapi" in goals
    assert "fp32: at 2 callers, times fastapi" in goals
    assert len(goals) == len(set(goals))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rounds", "0"], "--rounds 0"),
        (["--callers", "many"], "--callers many"),
        (["--bundle", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_measured_is_told(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert http_classify.main(words) == 2
    assert told in capsys.readouterr().err


def test_a_bundle_without_a_classifier_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["classifier"] = None
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    assert http_classify.main(["--bundle", str(bundle)]) == 2
    assert "has no classifier" in capsys.readouterr().err


def test_rivals_answer_where_ours_does() -> None:
    from benchmarks.asks import PATHS

    assert PATHS["classify"] == PATH
