"""Atomic writes of array files."""

import os
from pathlib import Path

import numpy as np
import pytest

from pipelines.data import arrays
from pipelines.data.arrays import map_arrays, write_arrays, write_atomically


def test_two_writers_at_once_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second writer starts and ends just before the first renames its file."""
    path = tmp_path / "file"
    fsync = os.fsync

    def interrupted(descriptor: int) -> None:
        monkeypatch.setattr(arrays.os, "fsync", fsync)
        write_atomically(path, b"second")
        fsync(descriptor)

    monkeypatch.setattr(arrays.os, "fsync", interrupted)
    write_atomically(path, b"first")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(arrays.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_arrays_come_back_also_after_the_file_was_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    first = {"x": np.arange(6, dtype=np.int64).reshape(2, 3).T, "y": np.zeros((0, 4), np.uint8)}
    write_arrays(path, first)
    mapped = map_arrays(path)
    write_arrays(path, {"x": np.zeros(1)})
    for name, array in first.items():
        assert mapped[name].dtype == array.dtype
        assert np.array_equal(mapped[name], array)


def test_what_is_no_file_of_arrays(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        map_arrays(tmp_path / "none")
    (tmp_path / "text").write_text("not a safetensors file")
    with pytest.raises(ValueError, match="not a safetensors file"):
        map_arrays(tmp_path / "text")
