"""A pickle can reference any function; this reader returns only arrays."""

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.unpickle import load_array
from pipelines.errors import SourceError


def classic(array: np.ndarray) -> bytes:
    """Create a gzipped pickle with the module names of NumPy 1."""
    return gzip.compress(pickle.dumps(array, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


@pytest.mark.parametrize("array", [np.arange(12, dtype=np.uint8).reshape(3, 4), np.arange(5)])
def test_arrays_come_through(array: np.ndarray) -> None:
    loaded = load_array(classic(array), max_bytes=4096)
    assert loaded.dtype == array.dtype
    assert np.array_equal(loaded, array)


def test_a_pickle_that_calls_a_function_is_refused(tmp_path: Path) -> None:
    victim = tmp_path / "made"

    class Malice:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(victim),)

    with pytest.raises(SourceError, match=r"names posix.mkdir; only NumPy arrays"):
        load_array(gzip.compress(pickle.dumps(Malice())), max_bytes=4096)
    assert not victim.exists()


def test_a_bomb_is_refused() -> None:
    with pytest.raises(SourceError, match="more than 1000 bytes"):
        load_array(gzip.compress(bytes(10_000_000)), max_bytes=1000)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not gzip", "not a gzip file"),
        (gzip.compress(b"not a pickle"), "damaged"),
        (classic(np.arange(9))[:-12], "not a gzip file"),
        (gzip.compress(pickle.dumps([1, 2])), "holds list"),
        (gzip.compress(pickle.dumps("text")), "holds str"),
        (classic(np.array([None, "x"], dtype=object)), "not an array of integers"),
    ],
)
def test_anything_else_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        load_array(data, max_bytes=4096)
