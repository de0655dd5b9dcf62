"""Bodies of predict requests: encoded images, or a tensor."""

from __future__ import annotations

import base64
import binascii
import json
import logging
from typing import Any

import numpy as np
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from pipelines.errors import ContentTypeError, SpecError
from pipelines.shape import ImageShape

MAX_IMAGES = 256
"""Maximum number of images in a request."""

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it logs a warning for each malformed request


def parse_predict(content_type: str, body: bytes, image: ImageShape) -> list[bytes] | np.ndarray:
    """Return encoded images, or (k, c, h, w) uint8, from the body of a predict request.

    Args:
        content_type: ``image/png`` or ``image/jpeg`` for one image, ``multipart/form-data`` for files,
            ``application/json`` for a tensor.
        body: body as received.
        image: input shape of the model; a tensor must have it, encoded images are resized later.

    Raises:
        ContentTypeError: the content type is not supported.
        SpecError: a field is invalid; the message starts with its name.
    """
    kind, options = parse_options_header(content_type)
    if kind in (b"image/png", b"image/jpeg"):
        images: list[bytes] | np.ndarray = [body]
    elif kind == b"multipart/form-data":
        images = _files(body, options.get(b"boundary", b""))
    elif kind == b"application/json":
        images = _tensor(body, image)
    else:
        raise ContentTypeError(
            f"content-type: received {content_type[:100] or 'none'!r}",
            hint="send image/png, image/jpeg, multipart/form-data with image files, or application/json",
        )
    if not 1 <= len(images) <= MAX_IMAGES:
        raise SpecError(f"images: received {len(images)}", hint=f"send 1 to {MAX_IMAGES}")
    return images


def _files(body: bytes, boundary: bytes) -> list[bytes]:
    """Return the parts of a form, which must all be images; field names are ignored."""
    files: list[bytearray] = []

    def begin() -> None:
        if len(files) == MAX_IMAGES:
            raise SpecError(f"images: received more than {MAX_IMAGES}", hint=f"send 1 to {MAX_IMAGES}")
        files.append(bytearray())

    def data(chunk: bytes, start: int, end: int) -> None:
        files[-1] += chunk[start:end]

    try:
        parser = MultipartParser(boundary, {"on_part_begin": begin, "on_part_data": data})
        parser.write(body)
        parser.finalize()
    except MultipartParseError as error:
        raise SpecError(f"body: not a multipart form: {error}") from None
    return [bytes(file) for file in files]


def _tensor(body: bytes, image: ImageShape) -> np.ndarray:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"body: not JSON: {error}") from None
    if not isinstance(document, dict) or "images" not in document:
        raise SpecError("images: missing", hint='send {"images": [...]}')
    images = document["images"]
    expected = f"uint8 values 0…255 of shape (k, {', '.join(map(str, image.dims))})"
    array = _from_base64(images, image, expected) if isinstance(images, str) else _from_lists(images, expected)
    if array.ndim != 4 or array.shape[1:] != image.dims:
        raise SpecError(f"images: received shape {array.shape}", hint=f"send {expected}")
    return array


def _from_base64(text: str, image: ImageShape, expected: str) -> np.ndarray:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise SpecError(f"images: not base64: {error}", hint=f"send the bytes of {expected}") from None
    if len(raw) % image.pixels:
        raise SpecError(
            f"images: {len(raw)} bytes is not a multiple of {image.pixels} per image", hint=f"send {expected}"
        )
    return np.frombuffer(raw, np.uint8).reshape(-1, *image.dims)


def _from_lists(images: Any, expected: str) -> np.ndarray:
    try:
        array = np.array(images)
    except ValueError:
        raise SpecError("images: received unequal shapes", hint=f"send {expected}") from None
    if array.dtype.kind != "i" or (array.size and (array.min() < 0 or array.max() > 255)):
        raise SpecError(f"images: received values outside 0…255 ({array.dtype})", hint=f"send {expected}")
    return array.astype(np.uint8)
