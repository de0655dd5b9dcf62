"""Safe reading of NumPy arrays from pickles, which can otherwise call any function."""

from __future__ import annotations

import gzip
import io
import pickle
import zlib
from typing import Any

import numpy as np
from numpy._core.multiarray import _reconstruct

from pipelines.errors import SourceError

_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise SourceError(f"the pickle names {module}.{name}; only NumPy arrays are admitted") from None


def load_array(data: bytes, max_bytes: int) -> np.ndarray:
    """Read a numeric array from a gzipped pickle.

    Args:
        data: gzipped pickle.
        max_bytes: limit on the decompressed size.

    Raises:
        SourceError: the pickle is damaged, too large, or contains anything but one array of numbers.
    """
    try:
        raw = gzip.GzipFile(fileobj=io.BytesIO(data)).read(max_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"not a gzip file: {error}") from None
    if len(raw) > max_bytes:
        raise SourceError(f"the pickle has more than {max_bytes} bytes")
    try:
        value = _ArrayUnpickler(io.BytesIO(raw)).load()
    except SourceError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise SourceError(f"the pickle is damaged: {type(error).__name__}: {error}") from None
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
        raise SourceError(f"the pickle holds {type(value).__name__}, not an array of integers")
    return value
