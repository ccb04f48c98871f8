"""The Dockerfile: through its linter, and what a hospital asks of an image."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from deploy import kit
from serving.scorer import ENVIRONMENT
from serving.settings import Settings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
FILE = DEPLOY / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """(word, rest) of each instruction, its lines joined, comments left out."""
    lines = [line for line in FILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    pairs = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(word, rest.strip()) for word, _, rest in pairs]


def of(word: str) -> list[str]:
    return [rest for name, rest in instructions() if name == word]


def test_the_linter_finds_nothing() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, FILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_would_find_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python\nRUN apt-get update && apt-get install curl\n")
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, bad], capture_output=True, text=True)
    assert done.returncode != 0
    assert "DL3006" in done.stdout


def test_nothing_is_asked_of_a_network() -> None:
    assert not re.search(r"https?://|\bapt|curl|wget|docker\.io|quay|ghcr", " ".join(of("RUN")))
    for run in of("RUN"):
        for command in re.findall(r"pip install[^&]*", run):
            for needed in ("--no-index", "--find-links /wheels", "--require-hashes", "--no-deps"):
                assert needed in command
    # A first line `# syntax=` would have BuildKit pull a frontend.
    assert not FILE.read_text().lower().startswith("# syntax")
    assert "ADD" not in dict(instructions())


def test_the_base_has_to_be_named() -> None:
    assert of("ARG") == ["BASE"]
    for stage in of("FROM"):
        assert stage.split()[0] in ("${BASE}", "common", "service")


def test_all_that_is_copied_is_in_a_kit() -> None:
    made = {"wheels", "requirements.txt", "bundle", "bento", "deploy/probe.py", "NOTICE", "LICENSE"}
    asked = {
        name for rest in of("COPY") if not rest.startswith("--from") for name in rest.split()[:-1]
    }
    assert asked == made


def test_it_runs_as_a_number_and_stops_as_it_should() -> None:
    assert of("USER") == ["1034:0"]
    assert of("STOPSIGNAL") == ["SIGTERM"]
    (command,) = [rest for rest in of("CMD") if "bentoml" in rest]
    # A shell between would keep the signal.
    assert command.startswith("[")
    words = [word for word, _ in instructions()]
    assert words.index("USER") < words.index("CMD")
    assert "chmod -R g=u /var/lib/dermaflux" in " ".join(of("RUN"))


def test_health_is_life_and_asked_without_curl() -> None:
    (health,) = of("HEALTHCHECK")
    assert '"/opt/dermaflux/probe.py", "/livez"' in health
    assert (DEPLOY / "probe.py").is_file()


def test_variables_are_those_that_the_service_takes() -> None:
    pairs = dict(pair.split("=", 1) for rest in of("ENV") for pair in rest.split() if "=" in pair)
    assert pairs["BENTOML_DO_NOT_TRACK"] == "true"
    for one in ENVIRONMENT:
        assert pairs[one["name"]] == one["value"]
    Settings.from_environment(pairs)
    assert pairs["BENTOML_HOME"].startswith("/var/lib/dermaflux/")


def test_versions_are_that_of_the_project() -> None:
    wanted = kit.version()
    assert f'image.version="{wanted}"' in FILE.read_text()
    for name in ("compose.yaml", "podman/dermaflux.container", "kubernetes/base/deployment.yaml"):
        assert f"dermaflux:{wanted}" in (DEPLOY / name).read_text()
    assert f"dermaflux-batch:{wanted}" in (DEPLOY / "batch/job.yaml").read_text()
