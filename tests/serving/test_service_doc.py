"""The operator's guide against the code: no setting and no route is missing there or made up."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from serving.settings import PREFIX, Settings

GUIDE = (Path(__file__).parents[2] / "docs/service.md").read_text()


def test_every_setting_is_in_the_guide_with_its_own_words() -> None:
    rows = dict(re.findall(rf"^\| `{PREFIX}(\w+)` \| .* \| (.*) \|$", GUIDE, re.MULTILINE))
    assert rows == {item.name.upper(): item.metadata["help"] for item in fields(Settings)}


def test_the_guide_names_no_setting_that_is_not_there() -> None:
    known = {item.name.upper() for item in fields(Settings)}
    assert set(re.findall(rf"{PREFIX}([A-Z_]+)", GUIDE)) <= known
