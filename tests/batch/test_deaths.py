from __future__ import annotations

from pathlib import Path

from serving.batch.deaths import HOPELESS, Deaths


def died(file: Path, *names: str) -> Deaths:
    """A process that was killed while it drew, and the next."""
    Deaths(file).begin(names)
    return Deaths(file)


def test_after_two_deaths_an_item_is_drawn_alone_and_after_five_given_up(tmp_path: Path) -> None:
    file = tmp_path / "deaths.json"
    told = [died(file, "a", "b") for _ in range(HOPELESS)]
    assert [one.alone("a") for one in told] == [False, True, True, True, True]
    assert [one.hopeless("b") for one in told] == [False, False, False, False, True]
    assert not told[-1].alone("c")


def test_what_ended_is_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "deaths.json"
    for _ in range(3):
        deaths = died(file, "a", "b")
    deaths.begin(["a"])
    deaths.end(["a"])
    again = Deaths(file)
    assert not again.alone("a")
    assert again.alone("b")


def test_who_closes_has_not_died(tmp_path: Path) -> None:
    file = tmp_path / "deaths.json"
    deaths = Deaths(file)
    deaths.begin(["a"])
    deaths.close()
    assert not file.exists()


def test_a_damaged_file_counts_nothing(tmp_path: Path) -> None:
    file = tmp_path / "deaths.json"
    for text in ("", "[]", "{", '{"counts": {"a": "x"}, "at": []}', '{"counts": 1, "at": 2}'):
        file.write_text(text)
        assert not Deaths(file).alone("a")
