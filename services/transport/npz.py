"""Arrays as .npz, read from senders who may mean harm."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from typing import Any

import numpy as np

from pipelines.errors import ProblemError, TooLargeError

MEMBERS = 16
"""Most arrays in one request."""

DIRECTORY_ENTRY = 512
"""Most bytes that each takes in the archive's directory."""


def write_npz(arrays: dict[str, Any]) -> bytes:
    """Arrays, numbers and strings as an uncompressed .npz."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def read_npz(body: bytes, limit: int, kinds: str = "fiubU") -> dict[str, np.ndarray]:
    """The arrays of an .npz that anyone may have made.

    NumPy's own reader unpacks whatever the archive says, and allocates whatever an array's header says. Here sizes are
    held against the limit before anything is unpacked, headers against the bytes that are there, and an array is a
    view of those bytes.

    Raises:
        ProblemError: not such an archive, or an array in it has another kind of content than ``kinds``.
        TooLargeError: the arrays have more bytes than the limit.
    """
    _check_directory(body)
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            members = archive.infolist()
            unpacked = sum(member.file_size for member in members)
            if unpacked > limit:
                raise TooLargeError(
                    f"{unpacked / 2**20:.1f} MiB of arrays received, at most {limit / 2**20:.1f} are taken",
                    hint="solve for fewer points, or raise the service's limit",
                )
            return {member.filename.removesuffix(".npy"): _array(archive, member, kinds) for member in members}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise ProblemError(f"not a readable .npz: {error}", hint="write it with numpy.savez") from None


def _check_directory(body: bytes) -> None:
    """Hold the archive's directory against its limit: opening an archive reads all of it, a million entries or two."""
    end, before = body[-22:], body[-42:-38]
    if len(end) < 22 or not end.startswith(b"PK\x05\x06") or before == b"PK\x06\x07":
        raise ProblemError("body: not an .npz", hint="write it with numpy.savez, or send JSON")
    entries = int.from_bytes(end[10:12], "little")
    size = int.from_bytes(end[12:16], "little")
    if entries > MEMBERS or size > MEMBERS * DIRECTORY_ENTRY:
        raise TooLargeError(f"{entries} arrays in {size} bytes of directory received, at most {MEMBERS} are taken")


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, kinds: str) -> np.ndarray:
    name = member.filename.removesuffix(".npy")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # The others take as much memory as the sender says.
        raise ProblemError(f"{name}: stored or deflated arrays expected")
    with archive.open(member) as packed:
        # With a bound, because without one it unpacks all that is there and looks at the declared size afterwards.
        file = io.BytesIO(packed.read(member.file_size))
    try:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read_header(file)
    except Exception as error:  # a header is Python text, and its parsers fail in many ways
        raise ProblemError(f"{name}: not a NumPy array: {str(error)[:200]}") from None
    content = file.getbuffer()[file.tell() :]
    if dtype.kind not in kinds or dtype.hasobject:
        raise ProblemError(f"{name}: numbers expected, received dtype {dtype}")
    if any(side < 0 for side in shape) or math.prod(shape) * dtype.itemsize != len(content):
        raise ProblemError(f"{name}: shape {shape} of {dtype} does not fit the {len(content)} bytes that came")
    flat: np.ndarray = np.ndarray(math.prod(shape), dtype, content) if len(content) else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if fortran else "C")
