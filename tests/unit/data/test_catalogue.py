"""Data sets of the catalogue: downloaded once, verified on every use."""

import gzip
import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pipelines.data import catalogue, packages
from pipelines.data.arrays import map_arrays, write_arrays
from pipelines.errors import SourceError


def refuse(*_: object, hint: str = "", **__: object) -> None:
    raise AssertionError("nothing was to be fetched")


def test_digits(tmp_path: Path) -> None:
    arrays = map_arrays(catalogue.fetch("digits", tmp_path))
    assert arrays["images"].shape == (1797, 8, 8, 1)
    assert (arrays["images"].min(), arrays["images"].max()) == (0, 255)
    assert sorted(np.unique(arrays["labels"])) == list(range(10))


def test_points_fill_the_square(tmp_path: Path) -> None:
    arrays = map_arrays(catalogue.fetch("points", tmp_path))
    images, labels = arrays["images"][..., 0], arrays["labels"]
    assert (images == images[:, :1]).all()
    left, right = images[:, 0, 1].astype(int), images[:, 0, 2].astype(int)
    assert (images[:, 0, 0] == left).all()
    assert (images[:, 0, 3] == right).all()
    assert len(set(zip(left.tolist(), right.tolist(), strict=True))) == 64**2
    assert (left.min(), left.max(), right.min(), right.max()) == (0, 255, 0, 255)
    assert np.array_equal(labels, right > left)


def test_the_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = catalogue.fetch("digits", tmp_path)
    written = path.stat().st_mtime_ns
    monkeypatch.setattr("sklearn.datasets.load_digits", refuse)
    assert catalogue.fetch("digits", tmp_path).stat().st_mtime_ns == written


@pytest.mark.parametrize("damage", ["flipped", "truncated", "other"])
def test_a_damaged_cache_is_replaced(tmp_path: Path, damage: str) -> None:
    path = catalogue.fetch("digits", tmp_path)
    data = path.read_bytes()
    if damage == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "truncated":
        path.write_bytes(data[:5000])
    else:
        write_arrays(path, {"images": np.zeros((1, 8, 8, 1), np.uint8), "labels": np.zeros(1, np.int64)})
    assert catalogue.fetch("digits", tmp_path).read_bytes() == data


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = catalogue.CATALOGUE["digits"]
    other = catalogue.CatalogueEntry(entry.classes, "0" * 64, entry.fetch)
    monkeypatch.setitem(catalogue.CATALOGUE, "digits", other)
    with pytest.raises(SourceError, match=r"digits: the arrays have sha256 .* expected 0000"):
        catalogue.fetch("digits", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_forged_wheel_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    wheel = tmp_path / "animal_mnist-0.4-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("animal_mnist/data/Animal_MNIST/animal_data_version_3.gz", b"")
    with pytest.raises(SourceError, match="its sha256 is not aeebf3d9"):
        catalogue.fetch("cats-and-dogs", tmp_path)


def test_a_wheel_reaches_a_cache_that_is_named_relatively(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], folder: Path, hint: str) -> None:
        destination = folder / command[command.index("--dest") + 1]  # as for a process that runs in the folder
        (destination / "some-1.0.whl").write_bytes(b"a wheel")

    monkeypatch.setattr(packages, "run_command", download)
    monkeypatch.chdir(tmp_path)
    wheel = packages.Wheel("some==1.0", "some-1.0.whl", hashlib.sha256(b"a wheel").hexdigest())
    assert wheel.fetch(Path("cache")).read_bytes() == b"a wheel"
    monkeypatch.setattr(packages, "run_command", refuse)
    assert wheel.fetch(Path("cache")).is_file()


def test_a_forged_idx_file_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    for split in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\0"))
    with pytest.raises(SourceError, match=r"train-images-idx3-ubyte.gz: its content has sha256"):
        catalogue.fetch("fashion-mnist", tmp_path)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(SourceError, match=r"train-images-idx3-ubyte.gz: cannot be read"):
        catalogue.fetch("fashion-mnist", tmp_path)


@pytest.mark.parametrize("command", [["false"], ["no-such-package-manager"]])
def test_a_failed_download_says_what_to_do(tmp_path: Path, command: list[str]) -> None:
    with pytest.raises(SourceError, match="hint: bring the file"):
        packages.run_command(command, tmp_path, hint="bring the file")


@pytest.mark.slow
def test_cats_and_dogs_from_the_package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = map_arrays(catalogue.fetch("cats-and-dogs", tmp_path))
    assert arrays["images"].shape == (2000, 28, 28, 1)
    assert np.bincount(arrays["labels"]).tolist() == [1000, 1000]
    monkeypatch.setattr(packages, "run_command", refuse)
    (tmp_path / "cats-and-dogs.safetensors").unlink()
    catalogue.fetch("cats-and-dogs", tmp_path)  # from the wheel in the cache


@pytest.mark.slow
def test_fashion_mnist_from_the_distribution(tmp_path: Path) -> None:
    arrays = map_arrays(catalogue.fetch("fashion-mnist", tmp_path))
    assert arrays["images"].shape == (70000, 28, 28, 1)
    assert np.bincount(arrays["split"]).tolist() == [60000, 10000]
    assert np.bincount(arrays["labels"]).tolist() == [7000] * 10
