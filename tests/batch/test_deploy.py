"""What schedulers are given: it parses, agrees with itself, and calls the command as it is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.batch.sharding import Shard, chosen

DEPLOY = Path(__file__).resolve().parents[2] / "deploy" / "batch"
SCRIPT = DEPLOY / "slurm.sh"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


@pytest.fixture
def job() -> dict[str, Any]:
    (document,) = documents("job.yaml")
    return document


def run(
    tmp_path: Path, *arguments: str, status: int = 0, **environment: str
) -> tuple[int, list[str], str]:
    """The script among a srun and a scontrol that only tell: status, their lines, its words."""
    for name, ends in (("srun", status), ("scontrol", 0)):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/sh\necho "{name} $*" >> "{tmp_path}/said"\nexit {ends}\n')
        tool.chmod(0o755)
    slurm = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "3", "SLURM_CPUS_PER_TASK": "4"}
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **slurm, **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, (tmp_path / "said").read_text().splitlines(), done.stderr


def test_the_script_is_bash_and_its_options_stand_before_the_first_command() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert os.access(SCRIPT, os.X_OK)
    lines = SCRIPT.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    # sbatch reads no option after it.
    first = next(n for n, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert all(lines.index(line) < first for line in options)
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=TERM@120"} <= {
        *options
    }


def test_the_script_starts_a_share_with_its_arguments(tmp_path: Path) -> None:
    asked = ["my requests.jsonl", "--bundle", "B", "--out", "D"]
    status, said, _ = run(tmp_path, *asked, PYTHON="python3")
    assert status == 0
    assert said == [
        "srun --ntasks=1 --cpus-per-task=4 python3 -m serving.batch --shard slurm --threads 4 "
        "my requests.jsonl --bundle B --out D"
    ]


def test_a_share_that_is_named_comes_after_the_scripts_own(tmp_path: Path) -> None:
    _, (said,), _ = run(tmp_path, "r.jsonl", "--shard", "slurm/0-15", "--threads", "2")
    assert said.endswith("--shard slurm --threads 4 r.jsonl --shard slurm/0-15 --threads 2")


@pytest.mark.parametrize(
    ("status", "words"), [(1, "mend them in the file"), (2, ""), (3, "free space"), (137, "")]
)
def test_what_failed_is_not_put_back(tmp_path: Path, status: int, words: str) -> None:
    ended, said, told = run(tmp_path, "r.jsonl", status=status)
    assert ended == status
    assert len(said) == 1
    assert words in told


def test_an_interrupted_task_is_put_back_alone_and_not_for_ever(tmp_path: Path) -> None:
    ended, said, _ = run(tmp_path, "r.jsonl", status=130, SLURM_RESTART_COUNT="1", RESTARTS="2")
    assert ended == 130
    assert said[1:] == ["scontrol requeue 40_3"]
    (tmp_path / "said").unlink()
    ended, said, told = run(tmp_path, "r.jsonl", status=130, SLURM_RESTART_COUNT="2", RESTARTS="2")
    assert (ended, len(said)) == (130, 1)
    assert "more --time" in told


def test_arguments_are_needed_of_the_command_not_of_the_script(tmp_path: Path) -> None:
    assert run(tmp_path, status=2)[0] == 2


def test_every_pod_knows_how_many_they_are(job: dict[str, Any]) -> None:
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert spec["completionMode"] == "Indexed"
    assert 1 <= spec["parallelism"] <= spec["completions"]
    (container,) = spec["template"]["spec"]["containers"]
    # Environment values are texts: a number is refused by the API.
    environment: dict[str, str] = {one["name"]: one["value"] for one in container["env"]}
    assert all(isinstance(value, str) for value in environment.values())
    option = container["args"][container["args"].index("--shard") + 1]
    shards = [
        chosen(option, environment | {"JOB_COMPLETION_INDEX": str(index)})
        for index in range(spec["completions"])
    ]
    assert shards == [Shard(n + 1, spec["completions"]) for n in range(spec["completions"])]


def test_pods_run_the_command_on_what_is_mounted(job: dict[str, Any]) -> None:
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command = container["command"] + container["args"]
    assert command[:4] == ["python", "-m", "serving.batch", "/job/requests.jsonl"]
    assert command[4:8] == ["--bundle", "/bundle", "--out", "/job/out"]
    # An engine's threads decide its last bits: they are those of the CPUs, not of whatever node.
    threads = command[command.index("--threads") + 1]
    assert threads == container["resources"]["requests"]["cpu"]
    mounts = {one["mountPath"]: one for one in container["volumeMounts"]}
    assert mounts.keys() == {"/job", "/bundle", "/tmp"}
    assert mounts["/bundle"]["readOnly"]
    volumes = {one["name"]: one for one in pod["volumes"]}
    assert {one["name"] for one in mounts.values()} == volumes.keys()
    assert "emptyDir" in volumes["tmp"]
    claims = {one["metadata"]["name"]: one["spec"] for one in documents("volumes.yaml")}
    asked = {one["persistentVolumeClaim"]["claimName"] for one in volumes.values()
             if "persistentVolumeClaim" in one}  # fmt: skip
    assert asked == claims.keys()
    assert all(claim["accessModes"] == ["ReadWriteMany"] for claim in claims.values())


def test_pods_have_no_rights_that_they_do_not_need(job: dict[str, Any]) -> None:
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    own = container["securityContext"]
    assert own["allowPrivilegeEscalation"] is False
    assert own["readOnlyRootFilesystem"] is True
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert {"requests", "limits"} <= container["resources"].keys()


def test_a_share_is_tried_again_by_its_status(job: dict[str, Any]) -> None:
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    # The API takes backoffLimitPerIndex and podFailurePolicy with this alone.
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["podReplacementPolicy"] == "Failed"
    assert spec["backoffLimitPerIndex"] >= 1
    assert "backoffLimit" not in spec
    codes: dict[str, list[int]] = {}
    for rule in spec["podFailurePolicy"]["rules"]:
        # One of the two, and the API refuses both in one rule.
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == container["name"]
            codes[rule["action"]] = rule["onExitCodes"]["values"]
    # 1 is not among them: items that failed are tried again, so many times.
    assert codes == {"FailJob": [3], "FailIndex": [2], "Ignore": [130]}
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= 60
