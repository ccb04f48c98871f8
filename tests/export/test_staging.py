"""A folder appears whole or not at all."""

from __future__ import annotations

import os

import pytest

from dermaflux.errors import BundleError
from export.staging import staged


def _bundle(folder, text):
    folder.mkdir(parents=True)
    (folder / "bundle.json").write_text(text)
    return folder


def test_it_appears_at_the_end(tmp_path):
    target = tmp_path / "bundles/new"
    with staged(target) as folder:
        (folder / "bundle.json").write_text("new")
        assert not target.exists()
        assert folder.parent == target.parent
    assert (target / "bundle.json").read_text() == "new"
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o777 & ~_umask()


def test_an_earlier_one_is_replaced_whole(tmp_path):
    target = _bundle(tmp_path / "bundle", "old")
    (target / "left.over").write_text("old")
    with staged(target) as folder:
        (folder / "bundle.json").write_text("new")
    assert [path.name for path in target.iterdir()] == ["bundle.json"]
    assert (target / "bundle.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("failure", [BundleError("refused"), KeyboardInterrupt(), SystemExit(143)])
def test_a_failure_leaves_the_earlier_one(tmp_path, failure):
    target = _bundle(tmp_path / "bundle", "old")

    def fail():
        with staged(target) as folder:
            (folder / "bundle.json").write_text("new")
            raise failure

    with pytest.raises(type(failure)):
        fail()
    assert (target / "bundle.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_swap_that_fails_puts_the_earlier_one_back(tmp_path, monkeypatch):
    target = _bundle(tmp_path / "bundle", "old")
    rename = type(target).rename

    def failing(self, to):
        if self.name.endswith(".partial"):
            raise OSError(28, "No space left on device")
        return rename(self, to)

    monkeypatch.setattr(type(target), "rename", failing)
    with pytest.raises(OSError, match="No space"), staged(target):
        pass
    assert (target / "bundle.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_what_is_not_a_bundle_is_left_alone(tmp_path):
    target = tmp_path / "photographs"
    target.mkdir()
    (target / "lesion.jpg").write_text("mine")
    with pytest.raises(BundleError, match="holds something that is not a bundle"), staged(target):
        pass
    assert (target / "lesion.jpg").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="is not a folder"), staged(tmp_path / "file"):
        pass


def test_a_place_that_takes_no_files_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    place = staged(tmp_path / "file/bundle")
    with pytest.raises(BundleError, match=r"cannot be written to .*another --out"), place:
        pass


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
