"""Decoding images of every mode; malicious bytes raise an error with a reason."""

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pipelines.data.decode import decode, shorter_side
from pipelines.errors import CorruptImageError

Encode = Callable[..., bytes]


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """Create a PNG of a few bytes whose header declares a large image."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_of_the_right_size_are_kept(encode: Encode, channels: int) -> None:
    shape = (16, 16) if channels == 1 else (16, 16, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    decoded = decode(encode(pixels), 16, channels)
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, expected)


def test_the_centre_is_cropped(encode: Encode) -> None:
    pixels = np.zeros((8, 20), np.uint8)
    pixels[:, 6:14] = 200
    assert (decode(encode(pixels), 8, 1) == 200).all()
    assert (decode(encode(pixels.T.copy()), 8, 1) == 200).all()


def test_shrinking_averages(encode: Encode) -> None:
    """A resized checkerboard is grey; without antialiasing it would be black or white."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    assert np.abs(decode(encode(board), 8, 1).astype(int) - 127).max() <= 2


def test_grey_and_colour_become_each_other(encode: Encode) -> None:
    grey = np.full((4, 4), 90, np.uint8)
    assert (decode(encode(grey), 4, 3) == 90).all()
    colour = np.zeros((4, 4, 3), np.uint8)
    colour[..., 1] = 255
    assert (decode(encode(colour), 4, 1) == 150).all()  # 0.587 × 255: ITU-R 601


def test_transparency_is_laid_over_white(encode: Encode) -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2, :, 3] = 255
    decoded = decode(encode(pixels), 4, 1)[0]
    assert (decoded[:2] == 0).all()
    assert (decoded[2:] == 255).all()


def test_palette_with_a_transparent_entry() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 10, 10, 200, 0, 0])
    image.paste(0, (0, 0, 4, 2))
    decoded = decode(saved(image, transparency=0), 4, 3)
    assert (decoded[:, :2] == 255).all()
    assert decoded[:, 3, 0].tolist() == [200, 0, 0]


@pytest.mark.parametrize("mode", ["1", "LA"])
def test_other_modes(mode: str) -> None:
    assert (decode(saved(Image.new("L", (4, 4), 255).convert(mode)), 4, 1) == 255).all()


def test_sixteen_bit_grey_is_scaled() -> None:
    values = np.array([[0, 257], [32896, 65535]], np.uint16).repeat(2, 0).repeat(2, 1)
    decoded = decode(saved(Image.fromarray(values)), 4, 1)[0]
    assert decoded[::2, ::2].tolist() == [[0, 1], [128, 255]]


def test_exif_orientation_is_applied() -> None:
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # turned upside down
    turned = decode(saved(Image.fromarray(pixels), "JPEG", quality=100, exif=exif), 16, 1)[0]
    assert turned[:7].max() < 10
    assert turned[9:].min() > 245


def test_a_large_jpeg_is_close_to_the_full_decoding() -> None:
    gradient = np.add.outer(np.arange(512), np.arange(512)).astype(np.float32) / 4
    data = saved(Image.fromarray(gradient.astype(np.uint8)), "JPEG", quality=95)
    full = np.asarray(Image.open(io.BytesIO(data)).resize((32, 32), Image.Resampling.BICUBIC))
    assert np.abs(decode(data, 32, 1)[0].astype(int) - full).max() <= 2


def test_the_shorter_side(encode: Encode) -> None:
    assert shorter_side(encode(np.zeros((5, 9), np.uint8))) == 5


def bad_images() -> dict[str, tuple[bytes, str]]:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    jpeg, png = saved(Image.fromarray(noise), "JPEG"), saved(Image.fromarray(noise))
    return {
        "empty": (b"", "not a PNG, JPEG or WebP"),
        "text": (b"not an image at all", "not a PNG, JPEG or WebP"),
        "truncated jpeg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated png": (png[: len(png) // 2], "cannot be decoded"),
        "flipped byte": (png[:100] + bytes([png[100] ^ 255]) + png[101:], "cannot be decoded"),
        "another format": (saved(Image.fromarray(noise), "GIF"), "not a PNG, JPEG or WebP"),
        "bomb": (png_claiming(9000, 9000), "9000 × 9000 pixels, over the limit"),
        "larger bomb": (png_claiming(60000, 60000), "header claims more pixels"),
        "promises more than it has": (png_claiming(1000, 1000), "cannot be decoded"),
    }


@pytest.mark.parametrize("case", bad_images())
def test_bad_images_are_refused_with_a_reason(case: str) -> None:
    data, reason = bad_images()[case]
    with pytest.raises(CorruptImageError, match=reason):
        decode(data, 16, 3)


def test_the_limits_are_the_callers(encode: Encode) -> None:
    data = encode(np.zeros((8, 8), np.uint8))
    with pytest.raises(CorruptImageError, match=f"{len(data)} bytes, over the limit of 10"):
        decode(data, 8, 1, max_bytes=10)
    with pytest.raises(CorruptImageError, match="8 × 8 pixels, over the limit of 63"):
        decode(data, 8, 1, max_pixels=63)


@pytest.mark.parametrize("side", [8, 97, 512, 4096])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_every_size(kind: str, side: int) -> None:
    data = saved(Image.new("RGB", (side, side + 3), (200, 100, 50)), kind)
    decoded = decode(data, 16, 3)
    assert np.abs(decoded.reshape(3, -1).astype(int).T - [200, 100, 50]).max() <= 3


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_webp_keeps_its_pixels(mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "RGBA":
        image.putalpha(255)
    assert np.array_equal(decode(saved(image, "WEBP", lossless=True), 16, 3), pixels.transpose(2, 0, 1))


def test_transparent_webp_is_laid_over_white() -> None:
    assert (decode(saved(Image.new("RGBA", (8, 8), (9, 9, 9, 0)), "WEBP", lossless=True), 8, 1) == 255).all()


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode(data, 8, 3)[:, 0, 0].tolist() == [255, 0, 0]


def test_cmyk_jpeg() -> None:
    """CMYK is subtractive: zero in all channels is white."""
    for ink, light in (((0, 0, 0, 0), 255), ((0, 0, 0, 255), 0)):
        decoded = decode(saved(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100), 16, 3)
        assert np.abs(decoded.astype(int) - light).max() <= 2


def test_a_bomb_takes_no_memory() -> None:
    data = png_claiming(50000, 50000)
    tracemalloc.start()
    with pytest.raises(CorruptImageError, match="its header claims more pixels than the limit"):
        decode(data, 16, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
