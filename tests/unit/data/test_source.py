"""Sources: the files that they read, and errors for invalid sources."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.source import fingerprint, open_source
from pipelines.data.sources.folder import FolderSource
from pipelines.errors import CorruptImageError, SourceError
from pipelines.spec import DataSpec


def test_a_folder(folder: Path, tmp_path: Path, encode: Callable[..., bytes]) -> None:
    deep = folder / "bee" / "more" / "still"
    deep.mkdir(parents=True)
    (deep / "x.JPEG").write_bytes(encode(np.full((8, 8, 3), 7, np.uint8), "JPEG"))
    (folder / "bee" / "notes.txt").write_text("not an image")
    (folder / "readme.md").write_text("nor this")
    (folder / "ant" / ".hidden.png").write_bytes(b"")
    (folder / ".cache").mkdir()
    source = open_source(DataSpec(source=str(folder)), tmp_path / "cache")
    assert isinstance(source, FolderSource)
    assert source.classes == ("ant", "bee")
    assert len(source) == 13
    assert source.ignored == 2
    assert source.image.dims == (1, 8, 8)
    assert [source.item(i)[1] for i in range(13)] == [0] * 6 + [1] * 7
    name, label, pixels = source.item(12)
    assert (name, label) == ("bee/more/still/x.JPEG", 1)
    assert (pixels == 7).all()
    assert source.official_split(0, 13) is None


def test_a_source_travels(folder: Path, tmp_path: Path) -> None:
    npz = tmp_path / "a.npz"
    np.savez(npz, images=np.zeros((900, 16, 16), np.uint8), labels=np.arange(900) % 2)
    for path in (folder, npz):
        source = open_source(DataSpec(source=str(path)), tmp_path / "cache")
        source.item(0)  # maps the file, if there is one
        sent = pickle.dumps(source)
        assert len(sent) < 2000
        assert np.array_equal(pickle.loads(sent).item(3)[2], source.item(3)[2])


def test_the_size_is_that_of_the_first_readable_image(
    folder: Path, tmp_path: Path, encode: Callable[..., bytes]
) -> None:
    (folder / "ant" / "-a.png").write_bytes(b"damaged")
    (folder / "ant" / "-b.png").write_bytes(encode(np.zeros((20, 12), np.uint8)))
    source = open_source(DataSpec(source=str(folder), channels=3), tmp_path)
    assert source.image.dims == (3, 12, 12)
    assert source.item(2)[2].shape == (3, 12, 12)
    with pytest.raises(CorruptImageError, match="not a PNG, JPEG or WebP"):
        source.item(0)


def test_the_size_asked_for(folder: Path, tmp_path: Path) -> None:
    source = open_source(DataSpec(source=str(folder), size=5), tmp_path)
    assert source.item(0)[2].shape == (1, 5, 5)


@pytest.mark.parametrize("shape", [(4, 6, 9), (4, 6, 9, 1), (4, 6, 9, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays(tmp_path: Path, shape: tuple[int, ...], channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array(["b", "a", "b", "c"]))
    source = open_source(DataSpec(source=str(tmp_path / "a.npz"), channels=channels), tmp_path / "cache")
    assert source.classes == ("a", "b", "c")
    assert [source.item(i)[1] for i in range(4)] == [1, 0, 1, 2]
    assert source.image.dims == (channels, 6, 6)
    assert source.item(1)[2].shape == (channels, 6, 6)


def test_arrays_keep_their_pixels(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 5, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "a.npz", images=images, labels=np.array([30, 4, 30]))
    source = open_source(DataSpec(source=str(tmp_path / "a.npz"), channels=3), tmp_path / "cache")
    assert source.classes == ("4", "30")
    for i in range(3):
        assert np.array_equal(source.item(i)[2], images[i].transpose(2, 0, 1))


def test_the_catalogue(tmp_path: Path) -> None:
    source = open_source(DataSpec(source="digits", size=16), tmp_path)
    assert source.image.dims == (1, 16, 16)
    assert source.classes == tuple("0123456789")
    assert source.fingerprint == fingerprint(DataSpec(source="digits", size=16))


def test_a_typo_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="did you mean fashion-mnist"):
        open_source(DataSpec(source="fashon-mnist"), tmp_path)
    with pytest.raises(SourceError, match="cats-and-dogs, fashion-mnist, digits"):
        open_source(DataSpec(source="nothing-of-the-kind"), tmp_path)


def test_folders_that_are_no_source(tmp_path: Path, encode: Callable[..., bytes]) -> None:
    root = tmp_path / "root"
    root.mkdir()
    spec = DataSpec(source=str(root))
    (root / "stray.png").write_bytes(b"")
    with pytest.raises(SourceError, match="no class folders"):
        open_source(spec, tmp_path)
    (root / "ant").mkdir()
    (root / "ant" / "a.png").write_bytes(encode(np.zeros((8, 8), np.uint8)))
    assert open_source(spec, tmp_path).classes == ("ant",)
    (root / "bee").mkdir()
    (root / "bee" / "notes.txt").write_text("")
    with pytest.raises(SourceError, match="class 'bee' has no images"):
        open_source(spec, tmp_path)
    with pytest.raises(SourceError, match=r"neither a folder nor a file in"):
        open_source(DataSpec(source=str(root / "stray.png")), tmp_path)


def test_a_folder_without_a_readable_image(folder: Path, tmp_path: Path) -> None:
    for path in folder.rglob("*.png"):
        path.write_bytes(b"damaged")
    with pytest.raises(SourceError, match="none of 12 images can be decoded"):
        open_source(DataSpec(source=str(folder)), tmp_path)


def test_images_too_large_to_keep_their_size(folder: Path, tmp_path: Path, encode: Callable[..., bytes]) -> None:
    (folder / "ant" / "0.png").write_bytes(encode(np.zeros((1025, 1100), np.uint8)))
    with pytest.raises(SourceError, match=r"1025 pixels.*\n.*set data.size"):
        open_source(DataSpec(source=str(folder)), tmp_path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.arange(2)}, "images"),
        ({"images": np.zeros((2, 8, 8), np.float32), "labels": np.arange(2)}, "type float32"),
        ({"images": np.zeros((2, 8, 8, 4), np.uint8), "labels": np.arange(2)}, "shape"),
        ({"images": np.zeros((2, 8), np.uint8), "labels": np.arange(2)}, "shape"),
        ({"images": np.zeros((2, 8, 8), np.uint8), "labels": np.arange(3)}, "labels has shape"),
        ({"images": np.zeros((2, 8, 8), np.uint8), "labels": np.ones(2)}, "type float64"),
        ({"images": np.zeros((2, 8, 8), np.uint8), "labels": np.array([None, 1])}, "allow_pickle"),
    ],
)
def test_arrays_that_are_no_source(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(SourceError, match=message):
        open_source(DataSpec(source=str(tmp_path / "a.npz")), tmp_path / "cache")


def test_a_damaged_npz_file(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(SourceError, match=r"a.npz"):
        open_source(DataSpec(source=str(tmp_path / "a.npz")), tmp_path / "cache")


def test_a_file_that_vanished(folder: Path, tmp_path: Path) -> None:
    source = open_source(DataSpec(source=str(folder)), tmp_path)
    (folder / "ant" / "3.png").unlink()
    with pytest.raises(SourceError, match=r"3.png: cannot be read"):
        source.item(3)


def test_the_fingerprint_follows_source_and_preparation(folder: Path, encode: Callable[..., bytes]) -> None:
    spec = DataSpec(source=str(folder))
    known = {fingerprint(spec)}
    assert fingerprint(spec.model_copy(update={"max_bad_fraction": 0.5})) in known

    def changed(spec: DataSpec) -> None:
        assert fingerprint(spec) not in known
        known.add(fingerprint(spec))

    changed(spec.model_copy(update={"size": 9}))
    changed(spec.model_copy(update={"channels": 3}))
    changed(spec.model_copy(update={"test_fraction": 0.3}))
    first = folder / "ant" / "0.png"
    first.rename(folder / "ant" / "9.png")
    changed(spec)
    os.utime(folder / "ant" / "9.png", ns=(1, 1))
    changed(spec)
    (folder / "ant" / "10.png").write_bytes(encode(np.zeros((8, 8), np.uint8)))
    changed(spec)


def test_links_and_pipes(folder: Path, tmp_path: Path) -> None:
    """Links to files are followed; broken links and pipes, which would block their reader, are ignored."""
    (folder / "ant" / "good.png").symlink_to(folder / "ant" / "0.png")
    (folder / "ant" / "broken.png").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "ant" / "pipe.png")
    source = open_source(DataSpec(source=str(folder)), tmp_path)
    assert (len(source), source.ignored) == (13, 2)
