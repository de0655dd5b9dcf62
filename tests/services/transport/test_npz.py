"""Malicious archives."""

import contextlib
import io
import pickle
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from pipelines.errors import ProblemError, TooLargeError
from services.transport.npz import read_npz, write_npz

LIMIT = 2**20


def header(text: str, version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text.encode("latin1")


def archive(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
        np.float32(3.5),
        np.array("squared-euclidean"),
        np.empty((0, 7), dtype=np.uint8),
        np.array([True, False]),
        np.arange(4, dtype=np.float16),
    ],
    ids=repr,
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read(array: np.ndarray, save: object) -> None:
    buffer = io.BytesIO()
    save(buffer, x=array)  # type: ignore[operator]
    (read,) = read_npz(buffer.getvalue(), LIMIT).values()
    assert read.dtype == np.asarray(array).dtype
    np.testing.assert_array_equal(read, array)


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = archive({"x.npy": bytes(50 * 2**20)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < LIMIT
    tracemalloc.start()
    with pytest.raises(TooLargeError, match=r"received 50\.0 MiB of arrays, the maximum is 1\.0"):
        read_npz(bomb, LIMIT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_a_bomb_that_lies_about_its_size_is_not_unpacked_beyond_it() -> None:
    bomb = bytearray(archive({"x.npy": bytes(50 * 2**20)}, zipfile.ZIP_DEFLATED))
    true_size = struct.pack("<I", 50 * 2**20)
    for place in (bomb.find(true_size), bomb.rfind(true_size)):
        bomb[place : place + 4] = struct.pack("<I", 1000)
    tracemalloc.start()
    with pytest.raises(ProblemError):
        read_npz(bytes(bomb), LIMIT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20


@pytest.mark.parametrize("fields", ["many", "directory", "zip64"])
def test_a_directory_of_a_million_entries_is_not_read(fields: str) -> None:
    entry = archive({"a": b""})[31:-22]
    directory = entry * 300_000
    end = bytearray(archive({"a": b""})[-22:])
    end[8:12] = struct.pack("<HH", *(2 * [60_000 if fields == "many" else 1]))
    end[12:16] = struct.pack("<I", len(directory) if fields == "directory" else 47)
    longer = b""
    if fields == "zip64":
        # The modest record at the end is overruled by one before it.
        record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 300_000, 300_000, len(directory), 0)
        longer = record + struct.pack("<4sLQL", b"PK\6\7", 0, len(directory), 1)
    started = time.thread_time()
    with pytest.raises((TooLargeError, ProblemError)):
        read_npz(directory + longer + bytes(end), 10 * LIMIT)
    assert time.thread_time() - started < 0.1


def test_a_header_that_promises_more_than_there_is_allocates_nothing() -> None:
    promise = header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }\n") + bytes(8)
    with pytest.raises(ProblemError, match="does not match the 8 bytes"):
        read_npz(archive({"x.npy": promise}), LIMIT)


@pytest.mark.parametrize(
    "text",
    [
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n",
        "{'descr': '|O8', 'fortran_order': False, 'shape': (), }\n",
        "{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (1,), }\n",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -1), }\n",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (2,), }\n",
        "{'descr': '<f8', 'fortran_order': 3, 'shape': (1,), }\n",
        "{'descr': 'nonsense', 'fortran_order': False, 'shape': (1,), }\n",
        "__import__('os').getcwd()\n",
        "(" * 500 + "\n",
        "  x\n y\n",
        "\x00\n",
        "",
    ],
)
def test_headers_that_mean_harm_are_problem_errors(text: str) -> None:
    with pytest.raises(ProblemError):
        read_npz(archive({"x.npy": header(text) + bytes(8)}), LIMIT)


def test_pickles_are_never_read() -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (pytest.fail, ("a pickle was read",))

    trap = pickle.dumps(np.array([Trap()], dtype=object))
    objects = header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n")
    for body in (trap, archive({"x.npy": trap}), archive({"x.npy": objects + trap})):
        with pytest.raises(ProblemError):
            read_npz(body, LIMIT)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_take_memory_at_the_senders_word_are_refused(method: int) -> None:
    with pytest.raises(ProblemError, match="stored or deflated"):
        read_npz(archive({"x.npy": b"abc"}, method), LIMIT)


def test_damage_anywhere_is_a_typed_error_or_no_error_at_all() -> None:
    good = write_npz({"x": np.ones((4, 3)), "y": np.ones((4, 3)), "cost": "euclidean"})
    generator = np.random.default_rng(0)
    for _ in range(2000):
        bad = bytearray(good)
        for place in generator.integers(0, len(bad), size=generator.integers(1, 4)):
            bad[place] = generator.integers(256)
        with contextlib.suppress(ProblemError, TooLargeError):
            read_npz(bytes(bad[: generator.integers(len(bad) // 2, len(bad) + 1)]), LIMIT)


@pytest.mark.parametrize("body", [b"", b"PK", b"PK\x05\x06" + bytes(18), bytes(1000), b"\xff" * 1000])
def test_what_is_no_archive_is_a_problem_error_or_empty(body: bytes) -> None:
    with contextlib.suppress(ProblemError):
        assert read_npz(body, LIMIT) == {}


def test_too_many_arrays_are_refused() -> None:
    with pytest.raises(TooLargeError, match="17 arrays"):
        read_npz(write_npz({f"x{index}": np.ones(1) for index in range(17)}), LIMIT)
