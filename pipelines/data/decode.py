"""Decoding of PNG, JPEG and WebP images, with limits for untrusted input."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from pipelines.errors import CorruptImageError

MAX_BYTES = 64 * 2**20
"""Largest size of an encoded image, in bytes."""

MAX_PIXELS = 2**26
"""Largest size of a decoded image, in pixels."""

SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes for 16-bit grey images."""


def decode(
    data: bytes, size: int, channels: int, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decode a PNG, JPEG or WebP image to a square of the requested size.

    The EXIF orientation is applied, transparent pixels are composed over white, 16-bit grey is scaled to 8 bits, CMYK
    is converted to RGB, and the first frame of an animation is used. Then the largest centred square is resized with an
    antialiased bicubic filter. Images that already have the right size keep their pixels.

    Args:
        data: encoded image.
        size: side of the square, in pixels.
        channels: 1 for grey (ITU-R 601 luma), 3 for colour.
        max_bytes: limit on ``data``.
        max_pixels: limit on width × height, checked before decompression.

    Returns:
        Pixels, (channels, size, size) uint8.

    Raises:
        CorruptImageError: the image cannot be decoded; the message has the reason.
    """
    image = _open(data, max_bytes, max_pixels)
    try:
        # A JPEG can be decoded at ½, ¼ or ⅛ for a fraction of the time; twice the size leaves the filter its work.
        image.draft(None, (2 * size, 2 * size))
        image = ImageOps.exif_transpose(image)
        return crop_and_resize(image, size, channels)
    except Exception as error:  # on damaged bytes Pillow's decoders raise nearly anything
        raise CorruptImageError(f"cannot be decoded: {_reason(error)}") from None


def shorter_side(data: bytes, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> int:
    """Read the shorter side of an encoded image, in pixels, from its header.

    Raises:
        CorruptImageError: the header cannot be read; the message has the reason.
    """
    return min(_open(data, max_bytes, max_pixels).size)


def crop_and_resize(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """Crop the largest centred square of an image, and resize it.

    Args:
        image: image of any mode.
        size: side of the result, in pixels.
        channels: 1 for grey, 3 for colour.

    Returns:
        Pixels, (channels, size, size) uint8.
    """
    image = _in_mode(image, "L" if channels == 1 else "RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    image = image.crop(box) if side == size else image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))


def _open(data: bytes, max_bytes: int, max_pixels: int) -> Image.Image:
    """Read the header, and reject images that are too large before decompression."""
    if len(data) > max_bytes:
        raise CorruptImageError(f"{len(data)} bytes, over the limit of {max_bytes}")
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
    except Image.DecompressionBombError:
        raise CorruptImageError(f"its header claims more pixels than the limit of {max_pixels}") from None
    except Exception as error:  # as in decode
        raise CorruptImageError(f"not a PNG, JPEG or WebP image: {_reason(error)}") from None
    if image.width * image.height > max_pixels:
        raise CorruptImageError(f"{image.width} × {image.height} pixels, over the limit of {max_pixels}")
    return image


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode in SIXTEEN_BIT:
        # Pillow's own conversion clips at 255 instead of scaling.
        values = np.asarray(image).astype(np.float32)
        image = Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _reason(error: Exception) -> str:
    text = str(error)
    # Pillow prints the address of the buffer, which differs between runs.
    return type(error).__name__ if not text or "BytesIO" in text else text
