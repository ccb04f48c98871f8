"""Requests: a line is right or wrong by itself, and what is mended later changes no other line."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dermaflux.bundle import Bundle
from dermaflux.errors import DatasetError
from dermaflux.flow import MAX_SEED
from dermaflux.prompt import Lesion, caption
from serving.batch import requests
from serving.batch.items import Bad, Item, item_seed
from serving.batch.jsonlines import MAX_LINE, MAX_REASON

NEVUS = '{"lesion": {"diagnosis": "nevus"}}'


def read(
    folder: Path, bundle: Bundle, *lines: str | dict[str, Any], run: int = 0
) -> tuple[list[Item], list[Bad]]:
    file = folder / "requests.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return requests.read(file, bundle, run)


def test_a_lesion_is_asked_by_its_caption_with_the_defaults_of_the_bundle(
    tmp_path: Path, tiny_bundle: Bundle
) -> None:
    items, bad = read(tmp_path, tiny_bundle, {"lesion": {"diagnosis": "nevus", "size": "small"}})
    lesion = Lesion("benign", "nevus", size="small")
    assert not bad
    (item,) = items
    assert (item.name, item.index, item.lesion, item.fixed) == ("0000000", 0, lesion, False)
    assert item.request.prompt == caption(lesion)
    assert item.request.seed == item_seed(0, "0000000")
    asked = item.request
    assert (asked.steps, asked.guidance, asked.height, asked.width) == (4, 3.5, 64, 64)


def test_all_that_is_given_is_kept(tmp_path: Path, tiny_bundle: Bundle) -> None:
    row = {
        "id": "case-7", "lesion": {"label": "malignant", "colors": ["black", "dark brown"]},
        "prompt": "naevus, façon « 皮膚 »", "seed": MAX_SEED, "steps": 20, "guidance": 0,
        "width": 128, "height": 32, "skin_type": "V-VI", "sex": "female", "age": 61.5,
        "site": "back", "label": "malignant", "colors": ["dark brown", "black"], "size": "large",
    }  # fmt: skip
    (item,), _ = read(tmp_path, tiny_bundle, row)
    assert item.name == "case-7"
    assert item.fixed
    assert item.lesion == Lesion("malignant", colors=("black", "dark brown"), size="large")
    assert vars(item.request) == {
        "prompt": row["prompt"], "seed": MAX_SEED, "steps": 20, "guidance": 0.0, "height": 32,
        "width": 128,
    }  # fmt: skip
    assert item.more == {"skin_type": "V-VI", "sex": "female", "age": 61.5, "site": "back"}


def test_null_is_as_if_it_were_not_there(tmp_path: Path, tiny_bundle: Bundle) -> None:
    plain = {"lesion": {"label": "benign"}}
    nulls: dict[str, Any] = {key: None for key in requests.KEYS} | plain
    (one, other), _ = read(tmp_path, tiny_bundle, plain, nulls)
    assert (
        one.digest == replace(other, request=replace(other.request, seed=one.request.seed)).digest
    )


BAD: dict[str, str] = {
    "nonsense": "is not JSON",
    "[1]": r"needs a JSON object, not \[1\]",
    "7": "needs a JSON object",
    "null": "needs a JSON object, not null",
    "[null, true, 1e999]": r"needs a JSON object, not \[null, true, inf\]",
    '{"lesion": {"label": "benign"}': "is not JSON .*column 31\\)",
    '{"lesion": {"label": "benign"} \t': "is not JSON .*column 31\\)",
    '{"lesion": {"label": "benign"}, "guidance": NaN}': "NaN is no number",
    '{"lesion": {"label": "benign"}, "age": Infinity}': "Infinity is no number",
    '{"lesion": {"label": "benign"}, "guidance": 1e999}': "guidance: inf is out of range",
    '{"lesion": {"label": "benign"}, "age": 1e999}': "age inf is no number of years",
    '{"lesion": {"label": "benign"}, "age": 1' + "0" * 400 + "}": "is no number of years",
    '{"lesion": {"label": "benign"}, "seed": -1'
    + "0" * 5000
    + "}": "has a number of 5001 digits, which no key takes$",
    '{"lesion": {"label": "benign"}, "age": true}': "age True",
    '{"lesion": {"label": "benign"}, "steps": true}': "steps: needs an integer",
    '{"lesion": {"label": "benign"}, "steps": 21}': "steps: 21 is out of range; use 1 to 20",
    '{"lesion": {"label": "benign"}, "seed": -1}': "seed: -1 is out of range",
    '{"lesion": {"label": "benign"}, "width": 65}': "width: 65 is not a multiple",
    '{"lesion": {"label": "benign"}, "sex": "F"}': "sex 'F' is not known",
    '{"lesion": {"label": "benign"}, "skin_type": 3}': "skin_type needs a text",
    '{"lesion": {"label": "benign"}, "site": "\\ud83e"}': r"'\\ud83e', half of a character",
    '{"lesion": {"label": "benign"}, "sedd": 1}': "'sedd' is not known; use id, lesion, prompt",
    '{"lesion": {"label": "benign"}, "\\ud83e": 1}': r"'\\ud83e' is not known",
    '{"lesion": {"label": "benign", "label": "malignant"}}': "names 'label' twice",
    '{"lesion": {"label": "benign", "\\ud83e": "x"}}': "is not an attribute",
    '{"lesion": {"label": "benign", "size": "huge"}}': "lesion.size: 'huge' is not known",
    '{"lesion": {"label": "benign"}, "label": "malignant"}': "label is 'malignant', but lesion.la",
    '{"lesion": {"diagnosis": "melanoma"}, "label": "benign"}': "'melanoma' is malignant",
    '{"lesion": {"label": "benign", "colors": ["black"]}, "colors": []}': "colors is",
    '{"lesion": [null]}': r"lesion needs an object, not \[null\]",
    '{"lesion": {"label": "benign", "colors": [true]}, "colors": []}': r"lesion.colors is \[true\]",
    '{"lesion": "benign"}': "lesion needs an object, not 'benign'",
    '{"label": "benign"}': "has neither lesion nor prompt",
    "{}": "has neither lesion nor prompt",
    '{"prompt": "a mole"}': "has a prompt and no label",
    '{"prompt": "a mole", "size": "small"}': "has a prompt and no label",
    '{"prompt": "a mole", "label": "good"}': "^label: 'good' is not known",
    '{"prompt": "a \\u0000 mole", "label": "benign"}': r"control character U\+0000",
    '{"prompt": "\\ud83e", "label": "benign"}': r"control character U\+D83E",
    '{"prompt": " ", "label": "benign"}': "prompt: is empty",
    '{"prompt": 7, "label": "benign"}': "prompt: needs a text",
    '{"prompt": ["a"], "label": "benign"}': "prompt: needs a text",
    '{"prompt": "' + "a" * 2001 + '", "label": "benign"}': "2001 characters; use at most 2000",
    '{"prompt": "' + "a" * MAX_LINE + '", "label": "benign"}': f"more than {MAX_LINE} bytes",
    '{"id": "../a", "lesion": {"label": "benign"}}': "'../a' cannot name a file",
    '{"id": 7, "lesion": {"label": "benign"}}': "id 7 cannot name a file",
    '{"id": "a\\n", "lesion": {"label": "benign"}}': "cannot name a file",
    "[" * 30_000: "too deeply",
    '{"lesion": ' + '{"label": ' * 3000 + "1" + "}" * 3001: "too deeply|not JSON|needs a word",
    "\ufeff" + NEVUS: "is not JSON",
}


@pytest.mark.parametrize("number", range(len(BAD)))
def test_a_bad_line_says_why_and_fails_no_other(
    tmp_path: Path, tiny_bundle: Bundle, number: int
) -> None:
    line, said = list(BAD.items())[number]
    items, bad = read(tmp_path, tiny_bundle, NEVUS, line, NEVUS)
    assert [item.name for item in items] == ["0000000", "0000002"]
    (one,) = bad
    assert one.line == 2
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(one.reason)
    assert one.reason.isprintable()
    assert len(one.reason) <= MAX_REASON
    one.reason.encode()


def test_all_kinds_of_bad_lines_at_once_cost_nothing_but_themselves(
    tmp_path: Path, tiny_bundle: Bundle
) -> None:
    lines = [line for bad in BAD for line in (bad, NEVUS)]
    items, bad = read(tmp_path, tiny_bundle, *lines)
    assert [item.index for item in items] == list(range(1, 2 * len(BAD), 2))
    assert [one.line for one in bad] == list(range(1, 2 * len(BAD), 2))
    alone, _ = read(tmp_path, tiny_bundle, *[NEVUS] * len(lines))
    assert items == alone[1::2]


def test_a_line_mended_changes_no_other(tmp_path: Path, tiny_bundle: Bundle) -> None:
    ids: dict[str, Any] = {"id": "a", "lesion": {"label": "benign"}}
    broken = [NEVUS, '{"lesion": ', ids | {"steps": -1}, NEVUS, ids, ids | {"id": "b"}]
    mended = [NEVUS, NEVUS, ids | {"steps": 3}, NEVUS, ids, ids | {"id": "b"}]
    before, bad = read(tmp_path, tiny_bundle, *broken, run=5)
    after, _ = read(tmp_path, tiny_bundle, *mended, run=5)
    # Line 5 repeats the id of line 3 also while line 3 is wrong, so mending that brings no quarrel.
    assert [one.line for one in bad] == [2, 3, 5]
    assert [item for item in after if item.index not in (1, 2)] == before
    assert len(after) == len(before) + 2


def test_of_equal_ids_the_first_holds(tmp_path: Path, tiny_bundle: Bundle) -> None:
    rows = [{"id": name, "lesion": {"label": "benign"}} for name in ("b", "a", "a", "A", "c")]
    items, bad = read(tmp_path, tiny_bundle, *rows)
    assert [item.name for item in items] == ["b", "a", "c"]
    assert [one.line for one in bad] == [3, 4]
    assert "that of line 2" in bad[1].reason


@pytest.mark.parametrize("place", [0, 2])
def test_an_id_that_another_place_has_by_default_holds(
    tmp_path: Path, tiny_bundle: Bundle, place: int
) -> None:
    lines: list[str | dict[str, Any]] = [NEVUS, NEVUS, NEVUS]
    lines[place] = {"id": "0000001", "lesion": {"label": "malignant"}}
    items, bad = read(tmp_path, tiny_bundle, *lines)
    assert [item.index for item in items] == [0, 2]
    assert items[place // 2].lesion.label == "malignant"
    (one,) = bad
    assert one.line == 2
    assert f"0000001, is the id of line {place + 1}" in one.reason


def test_an_id_may_be_the_default_of_its_own_place(tmp_path: Path, tiny_bundle: Bundle) -> None:
    named = {"id": "0000001", "lesion": {"diagnosis": "nevus"}}
    assert read(tmp_path, tiny_bundle, NEVUS, named) == read(tmp_path, tiny_bundle, NEVUS, NEVUS)


def test_blank_lines_and_a_byte_order_mark_do_not_count(
    tmp_path: Path, tiny_bundle: Bundle
) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_bytes(f"\ufeff\r\n \t\n{NEVUS}\r\n\n[\n\n{NEVUS}".encode())
    items, bad = requests.read(file, tiny_bundle, 0)
    assert [item.index for item in items] == [0, 2]
    assert [one.line for one in bad] == [5]
    file.write_bytes(f"\ufeff{NEVUS}".encode())
    assert len(requests.read(file, tiny_bundle, 0)[0]) == 1


def test_seeds_come_from_the_run_and_the_name_alone(tmp_path: Path, tiny_bundle: Bundle) -> None:
    row = {"id": "a", "lesion": {"label": "benign"}}
    (first, second), _ = read(tmp_path, tiny_bundle, row, NEVUS, run=1)
    (alone,), _ = read(tmp_path, tiny_bundle, row, run=1)
    (other,), _ = read(tmp_path, tiny_bundle, row, run=2)
    assert first.request.seed == alone.request.seed
    assert len({first.request.seed, second.request.seed, other.request.seed}) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no file"),
        (b"", "is empty; write a JSON object a line"),
        (b"\xef\xbb\xbf \n\n", "is empty"),
        (b"{\n[\n3\n4\n", r"its 4 lines are bad: line 1: .*; line 2: .*; line 3: [^;]*$"),
        (NEVUS.encode() + b'\n{"prompt": "na\xefve"}', r"line 2, byte 15 is not UTF-8"),
        (NEVUS.encode("utf-16"), "line 1, byte 1 is not UTF-8"),
    ],
)
def test_a_file_that_is_none_is_refused(
    tmp_path: Path, tiny_bundle: Bundle, content: bytes | None, said: str
) -> None:
    file = tmp_path / "requests.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DatasetError, match=said):
        requests.read(file, tiny_bundle, 0)


def test_folders_and_streams_are_refused(tmp_path: Path, tiny_bundle: Bundle) -> None:
    with pytest.raises(DatasetError, match="cannot be read: Is a directory"):
        requests.read(tmp_path, tiny_bundle, 0)
    with pytest.raises(DatasetError, match="name a file"):
        requests.read(Path("-"), tiny_bundle, 0)


def test_a_bundle_of_another_wording_is_asked_by_prompts_alone(
    tmp_path: Path, tiny_bundle: Bundle
) -> None:
    other = replace(tiny_bundle, wording="hospital-2")
    own = {"lesion": {"label": "benign"}, "prompt": "naevus"}
    items, bad = read(tmp_path, other, NEVUS, own, {"prompt": "naevus", "label": "benign"})
    assert [item.index for item in items] == [1, 2]
    assert "'hospital-2'" in bad[0].reason


def test_whatever_stands_in_a_line_is_an_item_or_a_reason(
    tmp_path: Path, tiny_bundle: Bundle
) -> None:
    source = random.Random(0)
    pool: list[Any] = [
        None, True, 0, -1, 7, 2.5, 1e308, "", "benign", "melanoma", "\ud800", "a\nb", [], ["black"],
        [["black"]], [1], {}, {"label": "benign"}, {"label": ["benign"]}, {"colors": "black"}, "é",
    ]  # fmt: skip
    rows = []
    for _ in range(3000):
        keys = source.sample((*requests.KEYS, "other"), source.randint(0, 4))
        rows.append({"lesion": {"label": "benign"}} | {key: source.choice(pool) for key in keys})
    items, bad = read(tmp_path, tiny_bundle, *rows)
    assert len(items) + len(bad) == 3000
    assert min(len(items), len(bad)) > 300
    for item in items:
        json.dumps([item.digest, item.name, item.request.prompt, dict(item.more)]).encode()
