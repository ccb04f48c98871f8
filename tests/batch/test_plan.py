"""Plans: exact counts, seeded pairing, groups mixed, contradictions refused by the key's path."""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from dermaflux import dataset
from dermaflux.bundle import Bundle
from dermaflux.dataset import Record
from dermaflux.errors import DatasetError
from dermaflux.prompt import caption
from serving.batch import documents, plan, quotas, requests
from serving.batch.items import Item, item_seed

PLAN = """
total: 435
prompt: "{caption}[, Fitzpatrick skin type {skin_type}]"
groups:
  - share: 0.4
    label: malignant
    diagnosis: {melanoma: 0.7, basal cell carcinoma: 0.3}
    colors: {dark brown: 2, black and dark brown: 1}
    size: {small: 1, medium: 2, large: 1, null: 1}
    skin_type: {I-II: 0.5, III-IV: 0.3, V-VI: 0.2}
    age: {20-39: 1, 60: 1, null: 2}
    sex: female
    steps: 7
  - share: 0.6
    diagnosis: nevus
    colors: [[dark brown], [dark brown, black], []]
    width: 96
    prompt: "{{{label}}} {diagnosis}, {site}[, {colors}]"
    site: back
"""


def read(folder: Path, bundle: Bundle, text: str, run: int = 0) -> list[Item]:
    (folder / "plan.yaml").write_text(textwrap.dedent(text), encoding="utf-8")
    return plan.read(folder / "plan.yaml", bundle, run)


def one(folder: Path, bundle: Bundle, text: str) -> list[Item]:
    """The pictures of a plan of one group."""
    return read(folder, bundle, f"groups: [{{{text}}}]")


def test_counts_are_exact_for_every_attribute_by_itself(
    tmp_path: Path, tiny_bundle: Bundle
) -> None:
    items = read(tmp_path, tiny_bundle, PLAN)
    assert [item.index for item in items] == list(range(435))
    malignant = [item for item in items if item.lesion.label == "malignant"]
    assert len(malignant) == 174
    assert Counter(item.lesion.diagnosis for item in malignant) == {
        "melanoma": 122, "basal cell carcinoma": 52,
    }  # fmt: skip
    assert Counter(item.lesion.colors for item in malignant) == {
        ("dark brown",): 116, ("dark brown", "black"): 58,
    }  # fmt: skip
    assert Counter(item.lesion.size for item in malignant) == {
        "medium": 69, "small": 35, "large": 35, None: 35,
    }  # fmt: skip
    assert Counter(item.more["skin_type"] for item in malignant) == {
        "I-II": 87, "III-IV": 52, "V-VI": 35,
    }  # fmt: skip
    ages = Counter(item.more.get("age") for item in malignant)
    assert (ages.pop(None), ages.pop(60)) == (87, 43)
    assert set(ages) == set(range(20, 40))
    assert set(ages.values()) == {2, 3}
    assert {item.more["sex"] for item in malignant} == {"female"}


def test_prompts_and_settings_are_those_of_the_group(tmp_path: Path, tiny_bundle: Bundle) -> None:
    for item in read(tmp_path, tiny_bundle, PLAN):
        request, lesion = item.request, item.lesion
        assert request.seed == item_seed(0, item.name)
        assert not item.fixed
        if lesion.label == "malignant":
            skin = item.more["skin_type"]
            assert request.prompt == f"{caption(lesion)}, Fitzpatrick skin type {skin}"
            assert (request.steps, request.width, request.height) == (7, 64, 64)
        else:
            colors = "".join(f", {' and '.join(lesion.colors)}" for _ in lesion.colors[:1])
            assert request.prompt == f"{{benign}} nevus, back{colors}"
            assert (request.steps, request.width, request.guidance) == (4, 96, 3.5)


def test_attributes_are_paired_by_chance_and_not_by_their_order(
    tmp_path: Path, tiny_bundle: Bundle
) -> None:
    text = "count: 4000, label: benign, size: {small: 1, large: 1}, border: {regular: 1, null: 1}"
    cells = Counter(
        (item.lesion.size, item.lesion.border) for item in one(tmp_path, tiny_bundle, text)
    )
    # Hypergeometric: 1,000 with a standard deviation of 16.
    assert len(cells) == 4
    assert all(abs(count - 1000) < 80 for count in cells.values())


def test_the_same_plan_and_seed_are_the_same_pictures_everywhere(
    tmp_path: Path, tiny_bundle: Bundle
) -> None:
    items = read(tmp_path, tiny_bundle, PLAN, run=3)
    assert items == read(tmp_path, tiny_bundle, PLAN, run=3)
    assert items != read(tmp_path, tiny_bundle, PLAN, run=4)
    # Written down, so that another machine, numpy or Python that draws otherwise is found out.
    text = "\n".join(plan.lines(items))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "4a026c4e72cce808"


def test_half_a_job_is_half_of_every_group_and_shards_are_alike(
    tmp_path: Path, tiny_bundle: Bundle
) -> None:
    text = """
    groups:
      - {count: 600, label: benign}
      - {count: 300, label: malignant}
      - {count: 20, diagnosis: actinic keratosis, label: malignant}
    """
    kinds = [
        item.lesion.diagnosis or item.lesion.label for item in read(tmp_path, tiny_bundle, text)
    ]
    for end in (92, 460, 700):
        seen = Counter(kinds[:end])
        for kind, size in (("benign", 600), ("malignant", 300), ("actinic keratosis", 20)):
            assert abs(seen[kind] - size * end / 920) <= 2
    for of in (2, 3, 7):
        for shard in range(of):
            mine = Counter(kinds[shard::of])
            assert abs(mine["benign"] - 600 / of) < 5 * (200 / of) ** 0.5
            assert mine["actinic keratosis"]


def test_two_even_groups_do_not_fall_to_a_shard_each(tmp_path: Path, tiny_bundle: Bundle) -> None:
    text = "groups: [{count: 200, label: benign}, {count: 200, label: malignant}]"
    labels = [item.lesion.label for item in read(tmp_path, tiny_bundle, text)]
    assert 60 < labels[::2].count("benign") < 140


def test_written_as_requests_they_are_the_same_pictures(
    tmp_path: Path, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(plan.Bundle, "open", lambda path: tiny_bundle)
    items = read(tmp_path, tiny_bundle, PLAN, run=9)
    out = tmp_path / "requests.jsonl"
    assert plan.main([str(tmp_path / "plan.yaml"), "--out", str(out), "--seed", "9"]) == 0
    assert requests.read(out, tiny_bundle, 9) == (items, [])
    assert [i.digest for i in requests.read(out, tiny_bundle, 9)[0]] == [i.digest for i in items]
    printed = capsys.readouterr()
    told = json.loads(printed.out.splitlines()[-1])
    assert (told["pictures"], told["labels"]) == (435, {"benign": 261, "malignant": 174})
    assert re.search(r"diagnosis: melanoma +0 +122 +122\n", printed.err)
    # A line taken out of the file leaves all others what they were.
    lines = out.read_text(encoding="utf-8").splitlines(keepends=True)
    out.write_text("".join(lines[:100] + lines[101:]), encoding="utf-8")
    left, bad = requests.read(out, tiny_bundle, 9)
    assert not bad
    assert [(i.name, i.digest) for i in left] == [
        (i.name, i.digest) for i in items if i.index != 100
    ]


def test_a_plan_that_is_wrong_ends_the_command_in_a_sentence(
    tmp_path: Path, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(plan.Bundle, "open", lambda path: tiny_bundle)
    assert plan.main([str(tmp_path / "none.yaml")]) == 2
    assert "there is no file" in capsys.readouterr().err
    read(tmp_path, tiny_bundle, PLAN)
    gone = str(tmp_path / "no" / "requests.jsonl")
    assert plan.main([str(tmp_path / "plan.yaml"), "--out", gone]) == 2
    assert "cannot be written" in capsys.readouterr().err


RECORDS = [
    *[Record(f"{n}.png", "benign", diagnosis="nevus", size="small", sex="male") for n in range(9)],
    Record("m1.png", "malignant", diagnosis="melanoma", size="large", age=61.5, site="back"),
    Record("m2.png", "malignant", diagnosis="basal cell carcinoma", colors=("black", "reddish")),
    Record("t.png", "malignant", diagnosis="squamous cell carcinoma", split="test"),
]
RECORDS[0] = replace(RECORDS[0], skin_type="V", sex="female")


@pytest.mark.parametrize("count", [11, 33, 40])
def test_like_a_dataset_takes_its_records_evenly_and_whole(
    tmp_path: Path, tiny_bundle: Bundle, count: int
) -> None:
    dataset.write(tmp_path, RECORDS)
    items = one(tmp_path, tiny_bundle, f"count: {count}, like: .")
    pairs = Counter((item.lesion, tuple(item.more.items())) for item in items)
    taken = [
        (
            r.lesion,
            tuple((n, v) for n in ("sex", "age", "site") if (v := getattr(r, n)) is not None),
        )
        for r in RECORDS
        if r.split == "train"
    ]
    assert set(pairs) <= set(taken)
    for record, times in Counter(taken).items():
        low, high = times * (count // 11), times * -(-count // 11)
        assert low <= pairs[record] <= high
    by_label = Counter(item.lesion.label for item in items)
    assert abs(by_label["malignant"] - count * 2 / 11) <= 1


def test_like_with_a_label_a_split_and_words_of_its_own(
    tmp_path: Path, tiny_bundle: Bundle
) -> None:
    dataset.write(tmp_path, RECORDS)
    only = one(tmp_path, tiny_bundle, "count: 10, like: ., label: malignant")
    assert {item.lesion.diagnosis for item in only} == {"melanoma", "basal cell carcinoma"}
    test = one(tmp_path, tiny_bundle, "count: 2, like: ., split: test")
    assert {item.lesion.diagnosis for item in test} == {"squamous cell carcinoma"}
    skins = one(
        tmp_path,
        tiny_bundle,
        'count: 10, like: ., skin_type: {V: 1, VI: 1}, prompt: "{caption}, type {skin_type}"',
    )
    assert Counter(item.more["skin_type"] for item in skins) == {"V": 5, "VI": 5}
    named = one(
        tmp_path,
        tiny_bundle,
        'count: 11, label: benign, like: ., prompt: "{caption}[, {age} years][, type {skin_type}]"',
    )
    assert any(item.request.prompt.endswith(", type V") for item in named)
    years = one(
        tmp_path, tiny_bundle, 'count: 2, label: malignant, like: ., prompt: "a lesion[, {age} y]"'
    )
    assert sorted(item.request.prompt for item in years) == ["a lesion", "a lesion, 61.5 y"]


GROUP = "groups: [{count: 1, label: benign, "
WRONG: dict[str, str] = {
    "": "needs a mapping with groups, not null",
    "[1]": "needs a mapping with groups",
    "total: 3": "groups: needs a list of groups",
    "groups: []": "groups: needs a list of groups",
    "groups: [benign]": r"groups\[0\]: needs a mapping",
    "group: []": "'group' is not known; use total, groups, prompt",
    "seed: 1": "'seed' is not known",
    "groups: [{label: benign}]": r"groups\[0\]: needs one of count and share",
    "groups: [{count: 1, share: 1, label: benign}]": "needs one of count and share",
    "groups: [{count: 0, label: benign}]": r"groups\[0\].count: 0 is no number of pictures",
    "groups: [{count: true, label: benign}]": "count: true is no number",
    "groups: [{count: 1.5, label: benign}]": "count: 1.5 is no number",
    "groups: [{count: 1e9, label: benign}]": "count: '1e9' is no number",
    "groups: [{count: 10000000, label: benign}]": "use 1 to 1000000",
    "groups: [{count: 900000, label: benign}, {count: 900000, label: benign}]": "sum of all counts",
    "{total: 3, groups: [{count: 1, label: benign}]}": "total: is 3, but the groups count 1",
    "{total: -3, groups: [{share: 1, label: benign}]}": "total: -3 is no number",
    "groups: [{share: 1, label: benign}]": "total: is missing",
    "{total: 9, groups: [{share: 0.5, label: benign}]}": "shares that sum to 0.5; they need 1",
    "{total: 9, groups: [{share: .nan, label: benign}]}": r"groups\[0\].share: nan is no weight",
    "{total: 9, groups: [{share: 1, label: benign}, {share: 0, label: benign}]}": r"\[1\].share: 0",
    "{total: 9, groups: [{share: 1, label: benign}, {count: 3}]}": r"groups\[1\].count: stands",
    "groups: [{count: 1, lable: benign}]": r"groups\[0\]: 'lable' is not known; use count",
    "groups: [{count: 1, 7: benign}]": "7 is not known",
    "groups: [{count: 1}]": r"groups\[0\].label: is missing",
    "groups: [{count: 1, diagnosis: actinic keratosis}]": "label: is missing, and 'actinic kera",
    "groups: [{count: 1, diagnosis: {nevus: 1, null: 1}}]": "label: is missing, and not every",
    "groups: [{count: 1, label: {benign: 1, null: 1}}]": "label: cannot be left out",
    GROUP + "diagnosis: melanoma}]": r"groups\[0\].diagnosis: 'melanoma' is malignant, but label",
    GROUP + "diagnosis: {nevus: 3, melanoma: 0.01}}]": "diagnosis: 'melanoma' is malignant",
    "groups: [{count: 9, label: {benign: 1, malignant: 1}, diagnosis: nevus}]": "may be 'malig",
    GROUP + "size: huge}]": r"groups\[0\].size: 'huge' is not known; use small, medium",
    GROUP + "size: [small, large]}]": "needs one word, or words with weights",
    GROUP + "size: {}}]": "size: is empty",
    GROUP + "size: {small: 0, large: 0}}]": "weights that are all 0",
    GROUP + "size: {small: -1, large: 2}}]": r"size.small: -1 is no weight",
    GROUP + "size: {small: .inf}}]": "size.small: inf is no weight",
    GROUP + "size: {null: .nan}}]": "size.null: nan is no weight",
    GROUP + "size: {small: yes}}]": "size.small: true is no weight",
    GROUP + "size: {small: '1'}}]": "size.small: '1' is no weight",
    GROUP + "size: {small}}]": "size.small: null is no weight",
    GROUP + "size: 2024-01-01}]": "needs a word, not datetime",
    GROUP + "colors: {black and dark brown: 1, dark brown and black: 1}}]": "black' twice",
    GROUP + "colors: [black, black]}]": "names a word twice",
    GROUP + "colors: [black, [dark brown]]}]": "mixes words and lists",
    GROUP + "colors: black and pink}]": "colors: 'pink' is not known",
    GROUP + "colors: 3}]": "colors: needs words, not 3",
    GROUP + "sex: no}]": "sex: needs a word, not false; put a word that YAML misreads in quotes",
    GROUP + "sex: F}]": "sex: 'F' is not known; use female, male",
    GROUP + 'site: "a\\nb"}]': "site: 'a.*nb' is no plain text",
    GROUP + 'site: "\\ud83e"}]': "no plain text|not YAML",
    GROUP + "age: 40-20}]": "age: '40-20' is no age",
    GROUP + "age: 131}]": "age: 131 is no age",
    GROUP + "age: 40.5}]": "age: 40.5 is no age",
    GROUP + "age: {20-30: 1, [20, 30]: 1}}]": "a key needs to be a word",
    GROUP + "skin_type: III}]": "skin_type: changes no picture, .* write prompt: .*{skin_type}",
    GROUP + 'skin_type: {III: 1, null: 1}, prompt: "{skin_type}"}]': "put it in square brackets",
    GROUP + 'prompt: "{caption}, {site}"}]': r"groups\[0\].prompt: names {site}, which some",
    GROUP + 'prompt: "{caption.x}"}]': "names {caption.x}, which is not known; use one of caption",
    GROUP + 'prompt: "{}"}]': "names {}, which is not known",
    GROUP + 'prompt: "{caption"}]': "has a { without its other half",
    GROUP + 'prompt: "{caption}]"}]': "has a ] without its other half",
    GROUP + 'prompt: "[[{caption}]"}]': "has a ] without its other half",
    GROUP + 'prompt: "[{caption}[{site}]]"}]': r"has a \[ without its other half",
    GROUP + 'prompt: "{caption} [close]"}]': r"write \[\[close\]\]",
    GROUP + "prompt: 3}]": "prompt: needs a text",
    GROUP + "prompt: '{" + "a" * 9999 + "'}]": "has a {|\\.\\.\\.$",
    GROUP + "size: " + "a" * 9999 + "}]": r"\.\.\.$",
    GROUP + 'prompt: ""}]': "prompt: is empty",
    GROUP + 'prompt: "a\\tb {caption}"}]': r"control character U\+0009",
    "prompt: '{'\n" + GROUP + "}]": r"plan.yaml: prompt: '{' has a {",
    GROUP + "steps: 21}]": r"groups\[0\].steps: 21 is out of range; use 1 to 20",
    GROUP + "guidance: .nan}]": r"groups\[0\].guidance: nan is out of range",
    "steps: x\n" + GROUP + "}]": "plan.yaml: steps: needs an integer, not 'x'",
    GROUP + "split: test}]": "split: says which records of like",
    GROUP + "like: nowhere}]": r"groups\[0\].like: .*nowhere is no dataset",
    GROUP + 'like: "\\0"}]': "like: needs the folder of a dataset",
    GROUP + "like: 3}]": "like: needs the folder of a dataset, not 3",
    GROUP + "like: ., size: small}]": r"groups\[0\].size: is drawn from like",
    GROUP + "like: ., split: all}]": "split: 'all' is not known",
    GROUP + "like: ., split: val}]": "like: .* has no benign record in split val",
    "groups: [{count: 1, like: ., label: {benign: 1, malignant: 1}}]": "label: needs one word besi",
    GROUP
    + 'like: ., prompt: "{caption}, {age}"}]': r"names {age}, which some pictures of groups\[0\]",
}


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_is_wrong_is_refused_by_its_path(
    tmp_path: Path, tiny_bundle: Bundle, number: int
) -> None:
    text, said = list(WRONG.items())[number]
    dataset.write(tmp_path, RECORDS)
    with pytest.raises(DatasetError, match=said) as refusal:
        read(tmp_path, tiny_bundle, text)
    assert str(refusal.value).startswith(f"{tmp_path}/plan.yaml")
    assert len(str(refusal.value)) < 700
    str(refusal.value).encode()


def test_a_bundle_of_another_wording_needs_prompts(tmp_path: Path, tiny_bundle: Bundle) -> None:
    other = replace(tiny_bundle, wording="hospital-2")
    with pytest.raises(DatasetError, match=r"prompt: .*'hospital-2'"):
        one(tmp_path, other, "count: 1, label: benign")
    assert one(tmp_path, other, 'count: 1, label: benign, prompt: "naevus, {label}"')


def test_labels_that_draw_nothing_are_told(
    tmp_path: Path, tiny_bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    one(tmp_path, tiny_bundle, "count: 2, label: benign, size: small, sex: female")
    assert caplog.messages[0].endswith("draw nothing: sex")
    caplog.clear()
    one(tmp_path, tiny_bundle, 'count: 2, label: benign, sex: male, prompt: "{caption}, {sex}"')
    assert not caplog.messages


YAMLS: dict[bytes, str] = {
    b"a: 1\nb: 2\na: 3\n": "line 3: 'a' stands there twice",
    b"a: &x [1]\nb: *x\n": r"line 2: aliases \(\*\) are not taken",
    b"a: 1\n<<: {b: 1}\n": "line 2: a key needs to be a word",
    b"a:\n  - b\n c: 1\n": "line 3: ",
    b"a: [1, 2\nb: 1": "line 2: ",
    b"a: 1\n\tb: 2": "line 2: ",
    b"a: 1\n---\nb: 2": "line 2: but found another document",
    b"a: !!python/object/apply:os.system ['id']": "line 1: the tag .*os.system is not taken",
    b"a: !!python/name:os.system x": "line 1: could not determine a constructor",
    b"a: 2024-13-45": "line 1: '2024-13-45': month must be in 1..12",
    b"a: !!int abc": "line 1: 'abc'",
    b"a: !!bool abc": "line 1: 'abc' is no value of its tag",
    b"a: !!set {x}": "line 1: the tag .*set is not taken",
    b"a: " + b"[" * 5000: "line 1: .*too deeply",
    b"a: " + b"1" * 5000: "line 1: '1{40}': it goes on for more than 300 characters, and no key",
    b"a: " + b"1" * 301: "more than 300 characters",
    b"a: 0x" + b"f" * 5000: "more than 300 characters",
    b"- a\n- " + b"1:" * 3000 + b"1": "line 2: .*more than 300 characters",
    b"a: \x00": "is not YAML: unacceptable character",
    b"a: na\xefve": "byte 6 is not UTF-8",
    b"#" * (documents.MAX_BYTES + 1): f"more than {documents.MAX_BYTES} bytes",
    b"? [a]\n: 1": "line 1: a key needs to be a word",
    b"%": "line 1: ",
}


@pytest.mark.parametrize("number", range(len(YAMLS)))
def test_yaml_is_read_strictly(tmp_path: Path, number: int) -> None:
    content, said = list(YAMLS.items())[number]
    file = tmp_path / "plan.yaml"
    file.write_bytes(content)
    with pytest.raises(DatasetError, match=said):
        documents.read(file)


def test_yaml_of_plain_values_is_read(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_bytes("\ufeffa: {é: 0.1, null: 2}\nb: [x y, 'no']\n".encode())
    assert documents.read(file) == {"a": {"é": 0.1, None: 2}, "b": ["x y", "no"]}


def test_quotas_are_within_one_of_every_share() -> None:
    weights = [Fraction(str(weight)) for weight in (0.1, 0.2, 0.3, 3, 0, 1e-9)]
    for total in (0, 1, 2, 7, 100, 4375):
        found = quotas.counts(weights, total)
        assert sum(found) == total
        for count, weight in zip(found, weights, strict=True):
            assert abs(count - total * weight / sum(weights)) < 1
        assert found[4] == 0
    assert quotas.counts([Fraction("0.7"), Fraction("0.3")], 10) == [7, 3]


@pytest.mark.parametrize(("size", "total"), [(1, 5), (5, 1), (7, 20), (20, 7), (10, 10)])
def test_a_spread_takes_every_stretch_evenly(size: int, total: int) -> None:
    for seed in "abcdef":
        taken = quotas.spread(size, total, seed)
        assert list(taken) == sorted(taken)
        assert len(taken) == total
        for low in range(size):
            for high in range(low + 1, size + 1):
                inside = ((taken >= low) & (taken < high)).sum()
                assert abs(inside - (high - low) * total / size) < 1
    assert len({tuple(quotas.spread(20, 7, str(seed))) for seed in range(20)}) > 5
