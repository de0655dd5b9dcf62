"""Reading and writing of .npz archives from untrusted senders."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from typing import Any

import numpy as np

from pipelines.errors import ProblemError, TooLargeError

MEMBERS = 16
"""Maximum number of arrays in a request."""

DIRECTORY_ENTRY = 512
"""Maximum size of each entry of the archive's directory, in bytes."""


def write_npz(arrays: dict[str, Any]) -> bytes:
    """Return arrays, numbers and strings as an uncompressed .npz."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def read_npz(body: bytes, limit: int, kinds: str = "fiubU") -> dict[str, np.ndarray]:
    """Return the arrays of an untrusted .npz.

    NumPy's reader trusts the sizes in the archive and in the headers of arrays. This one checks sizes against the limit
    before unpacking, and headers against the available bytes; arrays are views of those bytes.

    Raises:
        ProblemError: the body is not such an archive, or an array has a dtype other than ``kinds``.
        TooLargeError: the arrays exceed the limit.
    """
    _check_directory(body)
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            members = archive.infolist()
            unpacked = sum(member.file_size for member in members)
            if unpacked > limit:
                raise TooLargeError(
                    f"received {unpacked / 2**20:.1f} MiB of arrays, the maximum is {limit / 2**20:.1f} MiB",
                    hint="use fewer points, or raise the service's limit",
                )
            return {member.filename.removesuffix(".npy"): _array(archive, member, kinds) for member in members}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise ProblemError(f"not a readable .npz: {error}", hint="write it with numpy.savez") from None


def _check_directory(body: bytes) -> None:
    """Check the size of the archive's directory: opening an archive reads all of it, possibly millions of entries."""
    end, before = body[-22:], body[-42:-38]
    if len(end) < 22 or not end.startswith(b"PK\x05\x06") or before == b"PK\x06\x07":
        raise ProblemError("body: not an .npz", hint="write it with numpy.savez, or send JSON")
    entries = int.from_bytes(end[10:12], "little")
    size = int.from_bytes(end[12:16], "little")
    if entries > MEMBERS or size > MEMBERS * DIRECTORY_ENTRY:
        raise TooLargeError(f"received {entries} arrays in {size} bytes of directory, the maximum is {MEMBERS}")


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, kinds: str) -> np.ndarray:
    name = member.filename.removesuffix(".npy")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # Other methods take an amount of memory that the sender chooses.
        raise ProblemError(f"{name}: expected a stored or deflated array")
    with archive.open(member) as packed:
        # With a limit: without one, all data is unpacked before the declared size is checked.
        file = io.BytesIO(packed.read(member.file_size))
    try:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read_header(file)
    except Exception as error:  # the header is Python source, and its parsers raise many errors
        raise ProblemError(f"{name}: not a NumPy array: {str(error)[:200]}") from None
    content = file.getbuffer()[file.tell() :]
    if dtype.kind not in kinds or dtype.hasobject:
        raise ProblemError(f"{name}: expected numbers, received dtype {dtype}")
    if any(side < 0 for side in shape) or math.prod(shape) * dtype.itemsize != len(content):
        raise ProblemError(f"{name}: shape {shape} of {dtype} does not match the {len(content)} bytes received")
    flat: np.ndarray = np.ndarray(math.prod(shape), dtype, content) if len(content) else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if fortran else "C")
