"""The pack for hospitals: each statement names what shows it, and that is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs/hospital"
MADE = {"soup.md", "generator-card.md", "classifier-card.md"}
"""By commands that have tests of their own."""
WRITTEN = sorted(file.name for file in FOLDER.glob("*.md") if file.name not in MADE)
REFERENCE = re.compile(r"`([\w./-]+)(?:::(\w+))?`")
FOLDERS = ("benchmarks", "core", "deploy", "dermaflux", "docs", "serving", "training")
"""Of the project, and of its tests. Other words in code are commands, or places elsewhere."""


def references(text: str) -> list[tuple[str, str]]:
    """(file, test or nothing) of each."""
    return [
        (file, test)
        for file, test in REFERENCE.findall(text)
        if test or file in ("LICENSE", "CHANGELOG.md") or file.partition("/")[0] in FOLDERS
        if "." in file or "/" in file or file == "LICENSE"
    ]


def there(file: str) -> Path | None:
    """A file of the project, or of its tests."""
    for place in (ROOT / file, ROOT / "tests" / file):
        if place.is_file():
            return place
    return None


@cache
def functions_of(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    return {one.name for one in ast.walk(tree) if isinstance(one, ast.FunctionDef)}


def wrong(text: str) -> list[str]:
    """References that lead nowhere."""
    found = []
    for file, test in references(text):
        place = there(file)
        if place is None or (test and test not in functions_of(place)):
            found.append(f"{file}::{test}" if test else file)
    return found


def statements(text: str) -> list[str]:
    """Rows of tables, points of lists and paragraphs, but headings, code and introductions."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found: list[str] = []
    for part in re.split(r"\n(?=#)", text):
        blocks = [block.strip() for block in part.split("\n\n") if block.strip()]
        for block in blocks:
            lines = block.splitlines()
            if block.startswith("#"):
                continue
            if block.startswith("|"):
                found += lines[2:]
            elif block.startswith("- "):
                found += re.split(r"\n(?=- )", block)
            else:
                found.append(block)
    return found


@pytest.mark.parametrize("name", [file.name for file in sorted(FOLDER.glob("*.md"))])
def test_everything_that_is_named_is_there(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert wrong(text) == []
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (FOLDER / link).exists(), link


@pytest.mark.parametrize("name", [name for name in WRITTEN if name != "README.md"])
def test_every_statement_names_what_shows_it(name: str) -> None:
    said = statements((FOLDER / name).read_text())
    # The first says what the document is.
    introduction = 0 if references(said[0]) else 1
    assert len(said) > 5
    for one in said[introduction:]:
        assert references(one), one


def test_a_reference_to_nothing_would_be_found() -> None:
    assert wrong("`serving/test_access.py::test_free_text_is_a_right`") == []
    assert wrong("`serving/test_access.py::test_of_nothing`") != []
    assert wrong("`serving/nothing.py`") != []
    assert statements("# T\n\nIntro.\n\n| a |\n|---|\n| b |\n\n- c\n- d\n") == [
        *("Intro.", "| b |", "- c", "- d")
    ]


def test_every_document_is_in_the_index() -> None:
    index = (FOLDER / "README.md").read_text()
    for file in FOLDER.iterdir():
        assert file.name == "README.md" or f"]({file.name})" in index, file.name


def test_commands_in_documents_are_those_that_there_are() -> None:
    for file in [*(FOLDER / name for name in WRITTEN), ROOT / "deploy/README.md"]:
        for module in re.findall(r"python -m ((?:serving|deploy)[\w.]*)", file.read_text()):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
        for script in re.findall(r"sh (deploy/[\w/]+\.sh)", file.read_text()):
            assert (ROOT / script).is_file()
