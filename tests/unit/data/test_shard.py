"""Sharding and reading back; invalid images are quarantined."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.data import shard
from pipelines.data.arrays import map_arrays, write_arrays
from pipelines.data.loader import open_dataset
from pipelines.data.manifest import Manifest, read_manifest
from pipelines.data.shard import Receipt, chunks, content_hash, finished, write_manifest, write_shard
from pipelines.data.source import Source, open_source
from pipelines.data.sources.folder import FolderSource
from pipelines.errors import ShardError, SourceError, TooManyBadImagesError
from pipelines.shape import ImageShape
from pipelines.spec import DataSpec


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "SHARD_IMAGES", 5)


def build(spec: DataSpec, tmp_path: Path) -> tuple[Source, Manifest]:
    source = open_source(spec, tmp_path / "cache")
    out = tmp_path / "out"
    receipts = [write_shard(source, out, i, *span) for i, span in enumerate(chunks(len(source), source.image))]
    return source, write_manifest(source, spec, out, receipts)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_and_labels_come_back(folder: Path, tmp_path: Path, channels: int) -> None:
    source, manifest = build(DataSpec(source=str(folder), channels=channels), tmp_path)
    assert [entry.count for entry in manifest.shards] == [5, 5, 2]
    dataset = open_dataset(tmp_path / "out")
    assert dataset.image == source.image
    assert dataset.classes == ("ant", "bee")
    found = {}
    for split in (dataset.train, dataset.test):
        images, labels = split.take(np.arange(len(split)))
        found |= {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    assert found == {pixels.tobytes(): label for _, label, pixels in map(source.item, range(12))}


def test_the_manifest_counts_and_measures(folder: Path, tmp_path: Path) -> None:
    _, manifest = build(DataSpec(source=str(folder), channels=3, test_fraction=0.34), tmp_path)
    assert manifest.counts == {"train": {"ant": 4, "bee": 4}, "test": {"ant": 2, "bee": 2}}
    dataset = open_dataset(tmp_path / "out")
    images = dataset.train.take(np.arange(8))[0].numpy() / 255
    assert manifest.mean == pytest.approx(images.mean((0, 2, 3)))
    assert manifest.std == pytest.approx(images.std((0, 2, 3)))
    assert read_manifest(tmp_path / "out") == manifest


def test_twins_stay_on_one_side(folder: Path, tmp_path: Path) -> None:
    for i in range(6):
        data = (folder / "ant" / f"{i}.png").read_bytes()
        (folder / "bee" / f"twin{i}.png").write_bytes(data)
        (folder / "ant" / f"twin{i}.png").write_bytes(data)
    build(DataSpec(source=str(folder), test_fraction=0.5), tmp_path)
    dataset = open_dataset(tmp_path / "out")
    train, test = (
        {image.numpy().tobytes() for image in split.take(np.arange(len(split)))[0]}
        for split in (dataset.train, dataset.test)
    )
    assert len(dataset.train) + len(dataset.test) == 24
    assert len(train) + len(test) == 12
    assert not train & test


def test_bad_images_are_set_aside(folder: Path, tmp_path: Path, encode: Callable[..., bytes]) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    jpeg = encode(noise, "JPEG")
    (folder / "ant" / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "bee" / "text.png").write_text("no picture")
    source, manifest = build(DataSpec(source=str(folder), max_bad_fraction=0.2), tmp_path)
    assert (len(source), manifest.images, manifest.quarantined) == (14, 12, 2)
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert first["name"] == "ant/truncated.jpg"
    assert "truncated" in first["reason"]
    assert second == {"name": "bee/text.png", "reason": "not a PNG, JPEG or WebP image: UnidentifiedImageError"}


def test_a_shard_without_a_readable_image(folder: Path, tmp_path: Path) -> None:
    for i in range(5):
        (folder / "ant" / f"{i}.png").write_bytes(b"damaged")
    _, manifest = build(DataSpec(source=str(folder), max_bad_fraction=0.5), tmp_path)
    assert [(entry.file, entry.count) for entry in manifest.shards] == [
        ("shard-00001.safetensors", 5),
        ("shard-00002.safetensors", 2),
    ]
    assert len(open_dataset(tmp_path / "out").train) == manifest.counts["train"]["ant"] + 5


def test_too_many_bad_images(folder: Path, tmp_path: Path) -> None:
    for i in range(3):
        (folder / "ant" / f"{i}.png").write_bytes(b"damaged")
    spec = DataSpec(source=str(folder), max_bad_fraction=0.2)
    with pytest.raises(TooManyBadImagesError, match=r"3 or more of 12(.|\n)*ant/0.png: not a PNG") as caught:
        build(spec, tmp_path)
    assert "raise data.max_bad_fraction" in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    build(spec.model_copy(update={"max_bad_fraction": 0.25}), tmp_path)


def test_no_readable_image_at_all(tmp_path: Path, folder: Path) -> None:
    spec = DataSpec(source=str(folder), size=8, max_bad_fraction=0.99)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"damaged")
    with pytest.raises(TooManyBadImagesError):
        build(spec, tmp_path)


def test_a_class_without_a_readable_image(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "ant").iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(SourceError, match="class 'ant' has no readable image"):
        build(DataSpec(source=str(folder), max_bad_fraction=0.6), tmp_path)


def test_an_official_split_is_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "ant" / "2.png").write_bytes(b"damaged")
    official = np.array([0, 1] * 6, np.uint8)
    monkeypatch.setattr(FolderSource, "official_split", lambda self, start, stop: official[start:stop])
    _, manifest = build(DataSpec(source=str(folder), max_bad_fraction=0.1), tmp_path)
    index = map_arrays(tmp_path / "out" / "index.safetensors")
    assert np.array_equal(index["split"], np.delete(official, 2))
    assert manifest.counts["test"] == {"ant": 3, "bee": 3}


@pytest.mark.parametrize("file", ["shard-00001.safetensors", "index.safetensors"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_damage_is_named(folder: Path, tmp_path: Path, file: str, damage: str) -> None:
    build(DataSpec(source=str(folder)), tmp_path)
    path = tmp_path / "out" / file
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if damage == "flipped" else data[: len(data) // 2])
    with pytest.raises(ShardError, match=file):
        open_dataset(tmp_path / "out")
    unverified = slice(0)
    if damage == "flipped" and file.startswith("shard"):
        open_dataset(tmp_path / "out", unverified)
    else:
        with pytest.raises(ShardError, match=file):
            open_dataset(tmp_path / "out", unverified)


def test_ranks_verify_a_part_of_the_shards_each(folder: Path, tmp_path: Path) -> None:
    build(DataSpec(source=str(folder)), tmp_path)
    path = tmp_path / "out" / "shard-00001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert len(open_dataset(tmp_path / "out", slice(0, None, 2)).train)
    with pytest.raises(ShardError, match="shard-00001"):
        open_dataset(tmp_path / "out", slice(1, None, 2))


def test_swapped_shards_are_noticed_without_hashing(folder: Path, tmp_path: Path) -> None:
    build(DataSpec(source=str(folder)), tmp_path)
    out = tmp_path / "out"
    (out / "shard-00002.safetensors").replace(out / "shard-00000.safetensors")
    with pytest.raises(ShardError, match=r"shard-00000.safetensors: holds an array \(2, 1, 8, 8\)"):
        open_dataset(out, slice(0))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"schema_version": 1', '"schema_version": 2'),
        ("shard-00000", "../shard-00000"),
        ('"quarantined": 0', '"quarantined": -1'),
        ('"name"', '"nom"'),
        ('"name"', '"more": 1, "name"'),
        ("{", ""),
    ],
)
def test_a_strange_manifest_is_refused(folder: Path, tmp_path: Path, old: str, new: str) -> None:
    build(DataSpec(source=str(folder)), tmp_path)
    path = tmp_path / "out" / "manifest.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ShardError, match="not a manifest"):
        open_dataset(tmp_path / "out")


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"manifest.json: cannot be read"):
        open_dataset(tmp_path)


def test_a_finished_chunk_is_known_by_its_receipt(folder: Path, tmp_path: Path) -> None:
    spec, out = DataSpec(source=str(folder)), tmp_path / "out"
    source = open_source(spec, tmp_path)
    assert finished(source, out, 0, 0, 5) is None
    receipt = write_shard(source, out, 0, 0, 5)
    assert finished(source, out, 0, 0, 5) == receipt
    assert finished(source, out, 0, 0, 4) is None
    other = open_source(spec.model_copy(update={"channels": 3}), tmp_path)
    assert finished(other, out, 0, 0, 5) is None
    assert receipt.shard is not None
    path = out / receipt.shard.file
    path.write_bytes(path.read_bytes()[:-1])
    assert finished(source, out, 0, 0, 5) is None


def test_receipts_are_checked_documents(folder: Path, tmp_path: Path) -> None:
    source = open_source(DataSpec(source=str(folder)), tmp_path)
    receipt = write_shard(source, tmp_path / "out", 0, 0, 5)
    assert Receipt.model_validate_json(receipt.model_dump_json()) == receipt
    path = tmp_path / "out" / ".receipts" / "00000.safetensors"
    for told in (b'{"shard": "../../etc"}', b"", b"\xff"):
        write_arrays(path, {"receipt": np.frombuffer(told, np.uint8)})
        assert finished(source, tmp_path / "out", 0, 0, 5) is None
    write_arrays(path, {"labels": np.zeros(5)})
    assert finished(source, tmp_path / "out", 0, 0, 5) is None
    path.write_bytes(b"half a fi")
    assert finished(source, tmp_path / "out", 0, 0, 5) is None


def test_chunks_cover_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chunks(11, ImageShape(1, 8, 8)) == [(0, 5), (5, 10), (10, 11)]
    monkeypatch.setattr(shard, "SHARD_BYTES", 192 * 2)
    assert chunks(3, ImageShape(3, 8, 8)) == [(0, 2), (2, 3)]
    assert chunks(2, ImageShape(3, 1024, 1024)) == [(0, 1), (1, 2)]  # one image is never too many
    monkeypatch.undo()
    assert [len(chunks(n, ImageShape(1, 28, 28))) for n in (60_000, 100_000, 1_000_000, 4_000_000)] == [59, 64, 64, 187]


def test_the_content_hash_sees_the_shape() -> None:
    pixels = np.zeros((1, 4, 9), np.uint8)
    assert content_hash(pixels).shape == (16,)
    assert not np.array_equal(content_hash(pixels), content_hash(pixels.reshape(1, 6, 6)))
    assert np.array_equal(content_hash(pixels), content_hash(pixels.copy()))
