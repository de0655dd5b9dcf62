"""Decoding and sharding preserve the appearance of every pixel mode in every format that supports it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data.decode import decode
from pipelines.data.loader import open_dataset
from pipelines.data.shard import write_manifest, write_shard
from pipelines.data.source import open_source
from pipelines.spec import DataSpec

SIDE = 16
MODES = ("grey", "RGB", "RGBA", "palette", "transparent palette", "CMYK", "16 bit", "two tones")
FORMATS = ("PNG", "JPEG", "WEBP")
ABSENT = {
    *(("JPEG", mode) for mode in ("RGBA", "palette", "transparent palette", "16 bit")),
    *(("WEBP", mode) for mode in ("CMYK", "16 bit")),
    ("PNG", "CMYK"),
}
"""Modes that a format does not support."""
CASES = [(kind, mode) for kind in FORMATS for mode in MODES if (kind, mode) not in ABSENT]
TURNS = {
    1: lambda seen: seen,
    2: lambda seen: seen[:, ::-1],
    3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1],
    5: lambda seen: seen.transpose(1, 0, 2),
    6: lambda seen: seen[:, ::-1].transpose(1, 0, 2),
    7: lambda seen: seen[::-1, ::-1].transpose(1, 0, 2),
    8: lambda seen: seen.transpose(1, 0, 2)[:, ::-1],
}
"""Stored transposition for which each EXIF orientation displays the picture upright: the inverse of the viewer's."""


def picture(mode: str) -> tuple[Image.Image, np.ndarray]:
    """Create an image of a mode and its appearance, (SIDE, SIDE, 3): uniform quarters, which lossy formats keep."""
    colours = np.array([[[250, 10, 20], [30, 160, 40]], [[20, 30, 220], [200, 200, 60]]], np.uint8)
    greys = np.array([[0, 255], [90, 180]], np.uint8)
    if mode == "two tones":
        greys = np.array([[0, 255], [255, 0]], np.uint8)
    seen = np.repeat(greys[..., None], 3, axis=2) if mode in ("grey", "16 bit", "two tones") else colours
    seen = seen.repeat(SIDE // 2, 0).repeat(SIDE // 2, 1)
    image = Image.fromarray(seen)
    if mode in ("grey", "two tones"):
        image = image.convert("L")
        return (image.convert("1") if mode == "two tones" else image), seen
    if mode == "16 bit":
        return Image.fromarray(seen[..., 0].astype(np.uint16) * 257), seen
    if mode == "CMYK":
        return image.convert("CMYK"), seen
    if mode == "palette":
        return image.quantize(4), seen
    seen = seen.copy()
    if mode == "RGBA":
        alpha = np.full((SIDE, SIDE), 255, np.uint8)
        alpha[: SIDE // 2, : SIDE // 2] = 0
        image.putalpha(Image.fromarray(alpha))
        seen[: SIDE // 2, : SIDE // 2] = 255
    if mode == "transparent palette":
        image = image.quantize(4)
        image.info["transparency"] = image.getpixel((0, 0))
        seen[: SIDE // 2, : SIDE // 2] = 255
    return image, seen


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    lossless: dict[str, object] = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    if kind == "WEBP":
        lossless = {"lossless": True}
        # The format holds RGB and RGBA; its writer does not convert every mode by itself.
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    buffer = io.BytesIO()
    image.convert("L" if image.mode == "1" and kind == "JPEG" else image.mode).save(buffer, kind, **lossless, **options)
    return buffer.getvalue()


def expected(seen: np.ndarray, channels: int) -> np.ndarray:
    return np.asarray(Image.fromarray(seen).convert("L"))[None] if channels == 1 else seen.transpose(2, 0, 1)


def is_close(found: np.ndarray, seen: np.ndarray, kind: str) -> bool:
    """Whether pixels are equal, or for JPEG equal up to its quantisation."""
    return int(np.abs(found.astype(int) - seen).max()) <= (4 if kind == "JPEG" else 0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_an_image_is_what_it_looks_like(kind: str, mode: str, channels: int) -> None:
    image, seen = picture(mode)
    assert is_close(decode(encoded(image, kind), SIDE, channels), expected(seen, channels), kind)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", FORMATS)
def test_every_orientation(kind: str, orientation: int) -> None:
    _, seen = picture("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(TURNS[orientation](seen)))
    assert is_close(decode(encoded(stored, kind, exif=exif), SIDE, 3), expected(seen, 3), kind)


@pytest.mark.parametrize("channels", [1, 3])
def test_all_of_them_in_one_data_set(tmp_path: Path, channels: int) -> None:
    for label in ("one", "other"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number, (kind, mode) in enumerate(CASES):
            (tmp_path / "images" / label / f"{number:02d}.{kind.lower()}").write_bytes(encoded(picture(mode)[0], kind))
    spec = DataSpec(source=str(tmp_path / "images"), channels=channels, size=SIDE)
    source = open_source(spec, tmp_path)
    manifest = write_manifest(
        source, spec, tmp_path / "out", [write_shard(source, tmp_path / "out", 0, 0, len(source))]
    )
    assert (manifest.images, manifest.quarantined) == (2 * len(CASES), 0)
    dataset = open_dataset(tmp_path / "out")
    images = np.concatenate([part.take(np.arange(len(part)))[0].numpy() for part in (dataset.train, dataset.test)])
    for kind, mode in CASES:
        seen = expected(picture(mode)[1], channels)
        assert sum(is_close(image, seen, kind) for image in images) >= 2, (kind, mode)
