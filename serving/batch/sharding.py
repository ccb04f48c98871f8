"""Which share of a job this process draws: told by `--shard`, or by the scheduler's variables.

Shares are interleaved (share 2 of 3 has the items 1, 4, 7, ...), so that each has a like mixture.

    >>> shard = chosen("2/3", os.environ)
    >>> str(shard), shard.mine(4)
    ('2/3', True)

What `--shard` may be, and what is read of the environment:

    2/3                    nothing
    slurm                  SLURM_ARRAY_TASK_ID, _MIN, _MAX, _COUNT, _STEP: a whole array, such as
                           0-15, 1-16 or 0-30:2
    slurm/0-15 slurm/16    SLURM_ARRAY_TASK_ID: the array that the job was first submitted with, for
    slurm/0-30:2           a part of it submitted again (`sbatch --array=3,7`)
    kubernetes             JOB_COMPLETION_INDEX, and JOB_COMPLETIONS, which the manifest has to set
    kubernetes/16          JOB_COMPLETION_INDEX

Under `srun` with several tasks, each of an array's shares is divided among them once more
(SLURM_PROCID, SLURM_STEP_NUM_TASKS); without an array the tasks are the shares.

The option goes before the environment. Without it an array task or an indexed pod takes its own
share, which is logged: one that drew everything would do the work of all. A variable that is empty,
no number or out of range is an error, never a default: shards that silently fell back to the first
have lost others' data. So is part of an array without the whole: what `--array=3` is a part of,
SLURM does not tell, and by itself it looks like all of one. What is taken without being told the
whole covers all items when all its tasks have run.

The variables: https://slurm.schedmd.com/job_array.html, https://slurm.schedmd.com/srun.html,
https://kubernetes.io/docs/concepts/workloads/controllers/job/#completion-mode.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from dermaflux.errors import DatasetError

log = logging.getLogger(__name__)

_ARRAY: Final = "SLURM_ARRAY_TASK_ID"
_TASK: Final = "SLURM_PROCID"
# Not SLURM_NTASKS: a batch script has it too, with SLURM_PROCID 0, whether or not it calls srun.
_TASKS: Final = "SLURM_STEP_NUM_TASKS"
_POD: Final = "JOB_COMPLETION_INDEX"
_PODS: Final = "JOB_COMPLETIONS"
_MOST: Final = 1_000_000  # shares; more is a slip, and SLURM's MaxArraySize is far below


@dataclass(frozen=True)
class Shard:
    """A share of a job: `number` of `of`, from 1."""

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.of <= _MOST or not 1 <= self.number <= self.of:
            raise DatasetError(
                f"there is no share {self.number}/{self.of}; number them 1/{max(self.of, 1)} to "
                f"{max(self.of, 1)}/{max(self.of, 1)}, {_MOST} at most"
            )

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def mine(self, index: int) -> bool:
        """Whether the item with this place in the job, from 0, is of this share."""
        return index % self.of == self.number - 1


def chosen(option: str | None, environment: Mapping[str, str]) -> Shard:
    """The share of this process; `option` is what `--shard` says, None where it is not given.

    Raises:
        DatasetError: the option is of no known form, or a variable is missing, empty, no number,
            out of range, or at odds with another; with its value and what to set.
    """
    if option is None:
        return _noticed(environment)
    if re.fullmatch(r"\d{1,9}/\d{1,9}", option, re.ASCII):
        number, of = option.split("/")
        return Shard(int(number), int(of))
    scheduler, slash, whole = option.partition("/")
    if scheduler in ("slurm", "kubernetes") and bool(slash) == bool(whole):
        shard = (_slurm if scheduler == "slurm" else _kubernetes)(whole, environment)
        log.info("--shard %s: this is share %s", option, shard)
        return shard
    raise DatasetError(
        f"--shard {option!r} is of no known form; use 2/3, slurm, slurm/0-15, kubernetes or "
        "kubernetes/16 (is a variable in it empty?)"
    )


def _noticed(environment: Mapping[str, str]) -> Shard:
    """The share that a scheduler means, where one started this; else everything."""
    if _ARRAY in environment and _POD in environment:
        raise DatasetError(
            f"both {_ARRAY} and {_POD} are set; say whose share to draw with --shard slurm or "
            "--shard kubernetes"
        )
    if _ARRAY in environment:
        shard = _slurm("", environment)
        log.info("%s is set: this is share %s; --shard 1/1 draws everything", _ARRAY, shard)
        return shard
    if _POD in environment:
        shard = _kubernetes("", environment)
        log.info("%s is set: this is share %s; --shard 1/1 draws everything", _POD, shard)
        return shard
    if _PODS in environment:
        raise DatasetError(
            f"{_PODS} is {environment[_PODS]!r}, but {_POD} is not set, so each pod would draw "
            "everything; set completionMode: Indexed in the Job, or --shard 1/1"
        )
    # Not taken for granted: a shell on a compute node may have inherited these.
    if _TASK in environment and environment.get(_TASKS, "1") != "1":
        raise DatasetError(
            f"this is one of {environment[_TASKS]} tasks of srun ({_TASKS}), and each would draw "
            "everything; use --shard slurm for a share each, or --shard 1/1 for everything"
        )
    return Shard(1, 1)


def _slurm(whole: str, environment: Mapping[str, str]) -> Shard:
    """The share of an array's task and, within it, of a step's task; `whole` is the array."""
    tasks = _value(_TASKS, environment, 1, _MOST) if _TASKS in environment else 1
    task = _value(_TASK, environment, 0, tasks - 1) if tasks > 1 else 0
    if _ARRAY in environment:
        array = _array(whole) if whole else _whole_array(environment)
        place = _place(array, environment)
    elif whole or tasks == 1:
        raise DatasetError(
            f"--shard slurm{'/' if whole else ''}{whole} needs {_ARRAY}, which is not set; submit "
            "with sbatch --array=0-15, or start several tasks with srun --ntasks=16"
        )
    else:
        array, place = range(1), 0
    return Shard(place * tasks + task + 1, len(array) * tasks)


def _whole_array(environment: Mapping[str, str]) -> range:
    """The array of this submission, if it can only be a whole one."""
    first, last, count = (
        _value(f"SLURM_ARRAY_TASK_{name}", environment, least, _MOST)
        for name, least in (("MIN", 0), ("MAX", 0), ("COUNT", 1))
    )
    # Of a list such as 0,2,4 the step is 1, so lists have holes whatever their numbers are.
    name = "SLURM_ARRAY_TASK_STEP"
    step = _value(name, environment, 1, _MOST) if name in environment else 1
    # One task is a share to be repeated far more often than a job of one share.
    if first > 1 or count == 1 or last - first != step * (count - 1):
        raise DatasetError(
            f"SLURM_ARRAY_TASK_MIN is {first}, _MAX is {last}, _COUNT is {count} and _STEP is "
            f"{step}: several tasks from 0 or 1 without holes would be a whole job, this may be a "
            "part of one; say what array the job was first submitted with, such as --shard "
            "slurm/0-15, slurm/1-16 or slurm/0-30:2"
        )
    return range(first, last + 1, step)


def _array(whole: str) -> range:
    """What `--shard slurm/...` names: `16` is `0-15`."""
    if (count := _count(whole)) is not None:
        return range(count)
    match = re.fullmatch(r"(\d{1,9})-(\d{1,9})(?::(\d{1,9}))?", whole, re.ASCII)
    if match:
        first, last, step = (int(text or 1) for text in match.groups())
        if first <= last and step >= 1 and last < first + _MOST:
            return range(first, last + 1, step)
    raise DatasetError(
        f"--shard slurm/{whole} names no array; use a range as in sbatch --array, such as "
        "slurm/0-15, slurm/1-16, slurm/0-30:2, or a count, slurm/16 for 0-15"
    )


def _place(array: range, environment: Mapping[str, str]) -> int:
    """Which of an array's tasks this is, from 0."""
    number = _value(_ARRAY, environment, 0, _MOST)
    # One-based arrays would else be noticed in their last task only, hours later.
    told = [
        (name, _value(name, environment, 0, _MOST))
        for name in (_ARRAY, "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX")
        if name == _ARRAY or name in environment
    ]
    for name, value in told:
        if value not in array:
            step = f":{array.step}" if array.step > 1 else ""
            raise DatasetError(
                f"{name} is {value}, which is not in the array {array[0]}-{array[-1]}{step}; say "
                "what array the job was first submitted with, such as --shard slurm/1-16"
            )
    return array.index(number)


def _kubernetes(whole: str, environment: Mapping[str, str]) -> Shard:
    """The share of a pod of an indexed Job; `whole` is the count of them, if it was told."""
    count = _count(whole)
    if whole and count is None:
        raise DatasetError(f"--shard kubernetes/{whole} needs a count, as in kubernetes/16")
    if _POD not in environment:
        raise DatasetError(
            f"--shard kubernetes needs {_POD}, which is not set; set completionMode: Indexed in "
            "the Job"
        )
    if count is None or _PODS in environment:
        if _PODS not in environment:
            raise DatasetError(
                f"{_PODS} is not set, and Kubernetes tells a pod its index alone; set it in the "
                "container's env to the Job's completions, or use --shard kubernetes/16"
            )
        told = _value(_PODS, environment, 1, _MOST)
        if count not in (None, told):
            raise DatasetError(
                f"--shard kubernetes/{whole}, but {_PODS} is {told}; make both the Job's "
                "completions"
            )
        count = told
    return Shard(_value(_POD, environment, 0, count - 1) + 1, count)


def _count(text: str) -> int | None:
    """The number of shares that a text is, or None."""
    if re.fullmatch(r"\d{1,9}", text, re.ASCII) and 1 <= int(text) <= _MOST:
        return int(text)
    return None


def _value(name: str, environment: Mapping[str, str], least: int, most: int) -> int:
    """A variable that has to be there and hold a whole number in a range."""
    text = environment.get(name)
    if text is None:
        raise DatasetError(f"{name} is not set; use --shard with a share such as 2/3")
    if not text.isascii() or not text.isdigit():
        raise DatasetError(
            f"{name} is {text!r}; it needs a whole number, {least} to {most}; or use --shard with "
            "a share such as 2/3"
        )
    # Python refuses to read numbers of some thousand digits.
    if len(text) > 9 or not least <= int(text) <= most:
        raise DatasetError(
            f"{name} is {text}, out of the range {least} to {most}; make the count of shares that "
            "of the job, or use --shard with a share such as 2/3"
        )
    return int(text)
