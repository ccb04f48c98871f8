"""Shares of a job: together they are all of it, and what a scheduler leaves unsaid is an error."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import pytest

from dermaflux.errors import DatasetError
from serving.batch.sharding import Shard, chosen


def array(ids: list[int] | range) -> list[dict[str, str]]:
    """The environments of an array's tasks: as SLURM 22.05 makes them of a range, or of a list."""
    return [
        {
            "SLURM_ARRAY_TASK_ID": str(one),
            "SLURM_ARRAY_TASK_MIN": str(min(ids)),
            "SLURM_ARRAY_TASK_MAX": str(max(ids)),
            "SLURM_ARRAY_TASK_COUNT": str(len(ids)),
            "SLURM_ARRAY_TASK_STEP": str(ids.step if isinstance(ids, range) else 1),
            "SLURM_PROCID": "0",
        }
        for one in ids
    ]


def pods(count: int) -> list[dict[str, str]]:
    return [
        {"JOB_COMPLETION_INDEX": str(one), "JOB_COMPLETIONS": str(count)} for one in range(count)
    ]


def srun(environment: Mapping[str, str], count: int) -> list[dict[str, str]]:
    """The environments of a step's tasks."""
    return [
        {**environment, "SLURM_PROCID": str(one), "SLURM_STEP_NUM_TASKS": str(count)}
        for one in range(count)
    ]


def assert_whole(shards: list[Shard]) -> None:
    """Every item is of one share, and none of two."""
    assert len({str(shard) for shard in shards}) == len(shards)
    for index in range(40):
        assert sum(shard.mine(index) for shard in shards) == 1


def test_shares_are_interleaved_and_together_all() -> None:
    assert [index for index in range(8) if Shard(2, 3).mine(index)] == [1, 4, 7]
    assert str(Shard(2, 3)) == "2/3"
    assert_whole([Shard(number, 5) for number in range(1, 6)])


@pytest.mark.parametrize("option", [None, "slurm"])
@pytest.mark.parametrize(
    "ids", [range(16), range(1, 17), range(2), range(1, 3), range(0, 31, 2), range(1, 32, 2)]
)
def test_a_whole_array_is_all_of_a_job(option: str | None, ids: range) -> None:
    shards = [chosen(option, one) for one in array(ids)]
    assert [shard.number for shard in shards] == list(range(1, len(ids) + 1))
    assert_whole(shards)


@pytest.mark.parametrize("option", [None, "kubernetes", "kubernetes/16"])
def test_an_indexed_job_is_all_of_a_job(option: str | None) -> None:
    assert_whole([chosen(option, one) for one in pods(16)])


def test_the_count_of_pods_may_come_from_the_option_alone() -> None:
    assert chosen("kubernetes/16", {"JOB_COMPLETION_INDEX": "3"}) == Shard(4, 16)


@pytest.mark.parametrize(
    ("option", "whole", "part"),
    [
        ("slurm/16", range(16), [3]),
        ("slurm/0-15", range(16), [3, 7, 9]),
        ("slurm/0-15", range(16), [0, 2, 4]),
        ("slurm/1-16", range(1, 17), [3]),
        ("slurm/0-30:2", range(0, 31, 2), [6, 8]),
        ("slurm/1", range(1), [0]),
        ("slurm/1-31:2", range(1, 32, 2), [31]),
    ],
)
def test_tasks_submitted_again_have_their_first_share(
    option: str, whole: range, part: list[int]
) -> None:
    first = {one: chosen(option, task) for one, task in zip(whole, array(whole), strict=True)}
    assert_whole([*first.values()])
    for one, task in zip(part, array(part), strict=True):
        assert chosen(option, task) == first[one]


@pytest.mark.parametrize("option", [None, "slurm"])
@pytest.mark.parametrize(
    "ids", [[0], [1], [3], [3, 7, 9], [0, 2, 4], [1, 3, 5], [2, 3, 4], [0, 1, 3]]
)
def test_part_of_an_array_is_never_taken_for_the_whole(option: str | None, ids: list[int]) -> None:
    for task in array(ids):
        with pytest.raises(DatasetError, match=rf"_MIN is {ids[0]}, .*--shard slurm/0-15"):
            chosen(option, task)


def test_every_task_of_an_array_from_one_hears_that_it_is_not_from_zero() -> None:
    for task in array(range(1, 17)):
        with pytest.raises(DatasetError, match=r"is 16, which is not in the array 0-15; say"):
            chosen("slurm/16", task)


def test_tasks_of_srun_divide_what_is_theirs() -> None:
    assert_whole([chosen("slurm", one) for one in srun({}, 4)])
    nodes = array([0, 1, 2])
    for option in ("slurm", "slurm/3", None):
        assert_whole([chosen(option, one) for node in nodes for one in srun(node, 4)])


def test_tasks_of_srun_do_not_all_draw_everything() -> None:
    for task in srun({}, 4):
        with pytest.raises(DatasetError, match="one of 4 tasks.*--shard slurm"):
            chosen(None, task)
    assert chosen("1/1", srun({}, 4)[2]) == Shard(1, 1)


def test_a_batch_script_is_no_task_of_srun() -> None:
    """It has SLURM_PROCID and SLURM_NTASKS, and would take the first share of four for its own."""
    script = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    assert chosen(None, script) == Shard(1, 1)
    with pytest.raises(DatasetError, match=r"needs SLURM_ARRAY_TASK_ID.*sbatch --array=0-15"):
        chosen("slurm", script)


def test_the_option_goes_before_the_environment() -> None:
    both = array([0, 1])[0] | pods(3)[2]
    assert chosen("2/3", both) == Shard(2, 3)
    assert chosen("slurm", both) == Shard(1, 2)
    assert chosen("kubernetes", both) == Shard(3, 3)
    with pytest.raises(DatasetError, match="both SLURM_ARRAY_TASK_ID and JOB_COMPLETION_INDEX"):
        chosen(None, both)


def test_alone_everything_is_drawn_and_what_was_noticed_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    assert chosen(None, {"PATH": "/bin"}) == Shard(1, 1)
    assert not caplog.records
    chosen(None, pods(4)[1])
    assert "JOB_COMPLETION_INDEX is set: this is share 2/4" in caplog.text


@pytest.mark.parametrize(
    "option",
    ["", "/", "2/", "/3", "0/3", "4/3", "2/0", "-1/3", "2/3/4", "2 /3", "+2/3", "²/3", "auto",
     "slurm/", "slurm/0", "slurm/15-0", "slurm/0-15:0", "slurm/x", "slurm/3,7", "kubernetes/",
     "kubernetes/0", "kubernetes/x", "kubernetes/0-15", "1/99999999", f"1/{'9' * 5000}"],
)  # fmt: skip
def test_an_option_of_another_form_is_refused(option: str) -> None:
    with pytest.raises(DatasetError, match="--shard|no share"):
        chosen(option, array([0, 1])[0] | pods(3)[0])


@pytest.mark.parametrize("name", ["ID", "MIN", "MAX", "COUNT", "STEP"])
@pytest.mark.parametrize("value", ["", " ", "x", "-1", "1.5", "٣", "99999999", "9" * 5000, None])
def test_a_bad_variable_of_slurm_is_named(name: str, value: str | None) -> None:
    task = array(range(16))[5]
    variable = f"SLURM_ARRAY_TASK_{name}"
    if value is None:
        del task[variable]
    else:
        task[variable] = value
    if (name, value) == ("STEP", None):
        assert chosen("slurm", task) == Shard(6, 16)
        return
    options = ["slurm"] if (name, value) == ("ID", None) else ["slurm", None]
    for option in options:
        with pytest.raises(DatasetError, match=variable):
            chosen(option, task)


@pytest.mark.parametrize("value", ["", "x", "-1", "16", "1e1"])
def test_a_bad_index_of_kubernetes_is_named(value: str) -> None:
    for option in (None, "kubernetes", "kubernetes/16"):
        with pytest.raises(DatasetError, match=rf"JOB_COMPLETION_INDEX is '?{value}"):
            chosen(option, pods(16)[0] | {"JOB_COMPLETION_INDEX": value})


def test_a_missing_or_contradictory_count_of_pods_is_named() -> None:
    for option in (None, "kubernetes"):
        with pytest.raises(DatasetError, match="JOB_COMPLETIONS is not set.*completions"):
            chosen(option, {"JOB_COMPLETION_INDEX": "3"})
        with pytest.raises(DatasetError, match="JOB_COMPLETIONS is ''"):
            chosen(option, {"JOB_COMPLETION_INDEX": "3", "JOB_COMPLETIONS": ""})
    with pytest.raises(DatasetError, match="kubernetes/16, but JOB_COMPLETIONS is 8"):
        chosen("kubernetes/16", pods(8)[0])


def test_a_job_of_pods_without_indices_is_refused() -> None:
    for option in (None, "kubernetes"):
        with pytest.raises(DatasetError, match="JOB_COMPLETION_INDEX.*completionMode: Indexed"):
            chosen(option, {"JOB_COMPLETIONS": "4"})


@pytest.mark.parametrize("value", ["", "x", "4", None])
def test_a_bad_task_of_srun_is_named(value: str | None) -> None:
    task = {"SLURM_STEP_NUM_TASKS": "4"} | ({} if value is None else {"SLURM_PROCID": value})
    with pytest.raises(DatasetError, match="SLURM_PROCID"):
        chosen("slurm", task)
