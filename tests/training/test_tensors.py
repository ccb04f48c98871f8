"""Safetensors a tensor at a time: the library reads what is written, and damage is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from training import tensors
from training.tensors import DTYPES, Entry, TensorFile, WeightsError

CONTENT = {
    "b": torch.randn(3, 5, dtype=torch.float64),
    "a": torch.randn(7).bfloat16(),
    "c": torch.tensor(2.5),
    "e": torch.empty(0, 4),
    "d": torch.arange(5, dtype=torch.int8),
    "f": torch.randn(2, 3).to(torch.float8_e4m3fn),
    "g": torch.tensor([True, False]),
    "t": torch.randn(4, 6).T,
}


def save(path: Path) -> Path:
    entries = {name: Entry.of(tensor) for name, tensor in CONTENT.items()}
    tensors.write(path, entries, CONTENT.__getitem__, {"format": "pt", "by": "ü"})
    return path


def test_the_library_reads_what_is_written(tmp_path):
    file = save(tmp_path / "a.safetensors")
    found = load_file(file)
    assert found.keys() == CONTENT.keys()
    for name, tensor in CONTENT.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float())
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "by": "ü"}
    assert file.read_bytes() == save(tmp_path / "again.safetensors").read_bytes()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.safetensors", "again.safetensors"]


def test_what_the_library_writes_is_read(tmp_path):
    content = {name: tensor.contiguous() for name, tensor in CONTENT.items()}
    save_file(content, tmp_path / "a.safetensors", {"k": "v"})
    file = TensorFile.open(tmp_path / "a.safetensors")
    assert file.metadata == {"k": "v"}
    for name, tensor in content.items():
        assert file.entries[name] == Entry.of(tensor)
        assert torch.equal(file.read(name).float(), tensor.float())
    assert {DTYPES[entry.dtype] for entry in file.entries.values()} == {
        tensor.dtype for tensor in content.values()
    }


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def failing(name: str) -> torch.Tensor:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        tensors.write(tmp_path / "a", {"a": Entry("F32", (2,))}, failing, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (
            {"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}},
            "type F4, which is not known",
        ),
        (
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
            "the place of a is not its",
        ),
        (
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
            "the place of a is not its",
        ),
        ({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, "was cut: it has"),
        ({"a": {"dtype": "F32"}}, "no safetensors file: its header is not the object of"),
        ({"a": 3}, "no safetensors file: its header is not the object of"),
        ([], "no safetensors file: its header is not the object of"),
    ],
)
def test_a_header_that_lies(tmp_path, header, words):
    text = json.dumps(header).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(WeightsError, match=words):
        TensorFile.open(file)


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    file = save(tmp_path / "a.safetensors")
    opened = TensorFile.open(file)
    file.write_bytes(file.read_bytes()[: opened.starts["b"] + 8])
    with pytest.raises(WeightsError, match="was cut while it was read, at b"):
        opened.read("b")
