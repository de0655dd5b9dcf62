"""Named arrays in safetensors files, written atomically and read through the page cache."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file atomically, also if two processes write it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> str:
    """Write arrays to a safetensors file, atomically.

    Returns:
        The sha256 of the file, in hexadecimal.
    """
    data = pack_arrays(arrays)
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


def pack_arrays(arrays: dict[str, np.ndarray]) -> bytes:
    """Serialise arrays to the bytes of a safetensors file."""
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def unpack_arrays(data: bytes) -> dict[str, np.ndarray]:
    """Read arrays from the bytes of a safetensors file.

    Raises:
        ValueError: the bytes are not a safetensors file.
    """
    try:
        return load(data)
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file: {error}") from None


def map_arrays(path: Path) -> dict[str, np.ndarray]:
    """Map the arrays of a safetensors file into memory; pages are read on first access.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from None
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
