"""What a predict request may carry: encoded images, or a tensor."""

from __future__ import annotations

import base64
import binascii
import json
import logging
from typing import Any

import numpy as np
from fastapi import HTTPException
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.shape import ImageShape

MAX_IMAGES = 256
"""Most images in one request."""

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of each malformed request


class LimitBody:
    """ASGI middleware that ends a request whose body is over a limit, without reading the rest of it."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        left = self._max_bytes
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        too_large = declared.isdigit() and int(declared) > left

        async def limited() -> Message:
            nonlocal left
            if too_large:
                raise self._refusal()
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise self._refusal()
            return message

        await self._app(scope, limited, send)

    def _refusal(self) -> HTTPException:
        return rejected(
            413,
            f"the request is over the limit of {self._max_bytes} bytes",
            "send fewer images, or raise MONGE_MAX_REQUEST_MIB",
        )


def rejected(status: int, error: str, cure: str | None = None, field: str | None = None) -> HTTPException:
    """An answer that says what is wrong, where, and what to do."""
    return HTTPException(status, {"error": error, "cure": cure} | ({"field": field} if field else {}))


def parse_predict(content_type: str, body: bytes, image: ImageShape) -> list[bytes] | np.ndarray:
    """Encoded images, or (k, c, h, w) uint8, from the body of a predict request.

    Args:
        content_type: ``image/png`` or ``image/jpeg`` for one image as it is, ``multipart/form-data`` for files,
            ``application/json`` for a tensor.
        body: as received.
        image: the shape that the model takes; a tensor must have it, encoded images are fitted to it later.

    Raises:
        HTTPException: 415 for other types, 422 with the field that is wrong.
    """
    kind, options = parse_options_header(content_type)
    if kind in (b"image/png", b"image/jpeg"):
        images: list[bytes] | np.ndarray = [body]
    elif kind == b"multipart/form-data":
        images = _files(body, options.get(b"boundary", b""))
    elif kind == b"application/json":
        images = _tensor(body, image)
    else:
        raise rejected(
            415,
            f"content type {content_type or 'none'!r} is not understood",
            "send image/png, image/jpeg, multipart/form-data with such files, or application/json",
            "content-type",
        )
    if not 1 <= len(images) <= MAX_IMAGES:
        raise rejected(422, f"{len(images)} images received", f"send 1 to {MAX_IMAGES}", "images")
    return images


def _files(body: bytes, boundary: bytes) -> list[bytes]:
    """The parts of a form, all of which are images, whatever their names."""
    files: list[bytearray] = []

    def begin() -> None:
        if len(files) == MAX_IMAGES:
            raise rejected(422, f"over {MAX_IMAGES} images received", f"send 1 to {MAX_IMAGES}", "images")
        files.append(bytearray())

    def data(chunk: bytes, start: int, end: int) -> None:
        files[-1] += chunk[start:end]

    try:
        parser = MultipartParser(boundary, {"on_part_begin": begin, "on_part_data": data})
        parser.write(body)
        parser.finalize()
    except MultipartParseError as error:
        raise rejected(422, f"not a multipart form: {error}", field="body") from None
    return [bytes(file) for file in files]


def _tensor(body: bytes, image: ImageShape) -> np.ndarray:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise rejected(422, f"not JSON: {error}", field="body") from None
    if not isinstance(document, dict) or "images" not in document:
        raise rejected(422, "no field `images`", 'send {"images": [...]}', "images")
    images = document["images"]
    expected = f"uint8 values 0…255 of shape (k, {', '.join(map(str, image.dims))})"
    array = _from_base64(images, image, expected) if isinstance(images, str) else _from_lists(images, expected)
    if array.ndim != 4 or array.shape[1:] != image.dims:
        raise rejected(422, f"images of shape {array.shape} received", f"send {expected}", "images")
    return array


def _from_base64(text: str, image: ImageShape, expected: str) -> np.ndarray:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise rejected(422, f"not base64: {error}", f"send the bytes of {expected}", "images") from None
    if len(raw) % image.pixels:
        raise rejected(422, f"{len(raw)} bytes are not whole images of {image.pixels}", f"send {expected}", "images")
    return np.frombuffer(raw, np.uint8).reshape(-1, *image.dims)


def _from_lists(images: Any, expected: str) -> np.ndarray:
    try:
        array = np.array(images)
    except ValueError:
        raise rejected(422, "images of unequal shapes received", f"send {expected}", "images") from None
    if array.dtype.kind != "i" or (array.size and (array.min() < 0 or array.max() > 255)):
        raise rejected(422, f"values that are not 0…255 received ({array.dtype})", f"send {expected}", "images")
    return array.astype(np.uint8)
