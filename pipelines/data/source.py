"""Where images come from: the catalogue, a folder with one folder for each class, or an .npz file.

A source is cheap to send to another process on the same file system: it holds names and paths, never pixels.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import stat
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.data.arrays import map_arrays, write_arrays
from pipelines.data.catalogue import CATALOGUE, Arrays, fetch
from pipelines.data.decode import MAX_BYTES, decode, fit, shorter_side
from pipelines.errors import CorruptImageError, SourceError
from pipelines.shape import ImageShape
from pipelines.spec import DataSpec

SUFFIXES = (".png", ".jpg", ".jpeg")
SIDES = (4, 1024)
"""Least and greatest side of the square images, as in :class:`~pipelines.spec.DataSpec`."""


@dataclass(frozen=True)
class Source(ABC):
    """Labelled images, not yet decoded.

    Attributes:
        classes: names of the classes, by label.
        image: shape of the decoded images.
        fingerprint: sha256 of what identifies the images and their preparation, see :func:`fingerprint`.
        ignored: files beside the images that were passed over.
    """

    classes: tuple[str, ...]
    image: ImageShape
    fingerprint: str
    ignored: int

    @abstractmethod
    def __len__(self) -> int:
        """Number of images, damaged ones included."""

    @abstractmethod
    def item(self, i: int) -> tuple[str, int, np.ndarray]:
        """Name, label and (c, h, w) uint8 pixels of an image.

        Raises:
            CorruptImageError: it cannot be decoded.
            SourceError: it cannot be read.
        """

    @abstractmethod
    def name(self, i: int) -> str:
        """Name of an image: its path below the source's folder, or its number."""

    def official_split(self, start: int, stop: int) -> np.ndarray | None:
        """The source's own split of images ``start … stop − 1``: 0 for train, 1 for test; None when it has none."""
        return None


@dataclass(frozen=True)
class FolderSource(Source):
    """PNG and JPEG files in one folder for each class, at any depth below it.

    Attributes:
        root: folder of the class folders.
        files: paths below the root, by class and then by name.
        labels: of the files.
    """

    root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        return self.files[i]

    def item(self, i: int) -> tuple[str, int, np.ndarray]:
        data = _read(self.root / self.files[i])
        return self.files[i], self.labels[i], decode(data, self.image.height, self.image.channels)


@dataclass(frozen=True)
class ArraySource(Source):
    """Images in a file of arrays, see :data:`pipelines.data.catalogue.Arrays`.

    Attributes:
        path: the file.
    """

    path: Path

    def __len__(self) -> int:
        return len(self.arrays["labels"])

    def __getstate__(self) -> dict[str, object]:
        # The mapped pages stay behind; the other process maps the file itself.
        return {name: value for name, value in self.__dict__.items() if name != "arrays"}

    @cached_property
    def arrays(self) -> Arrays:
        """The arrays, mapped into memory."""
        return map_arrays(self.path)

    def name(self, i: int) -> str:
        return f"{self.path.stem}[{i}]"

    def item(self, i: int) -> tuple[str, int, np.ndarray]:
        pixels, label = self.arrays["images"][i], int(self.arrays["labels"][i])
        if pixels.shape == (self.image.height, self.image.width, self.image.channels):
            return self.name(i), label, np.ascontiguousarray(pixels.transpose(2, 0, 1))
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        return self.name(i), label, fit(image, self.image.height, self.image.channels)

    def official_split(self, start: int, stop: int) -> np.ndarray | None:
        split = self.arrays.get("split")
        return None if split is None else split[start:stop]


def open_source(spec: DataSpec, cache: Path) -> Source:
    """Open the source of a data spec; one of the catalogue is fetched if it is not in the cache.

    Args:
        spec: ``source`` is a catalogue name, a folder, or an .npz file with arrays ``images`` (n, h, w) or
            (n, h, w, c) uint8, c = 1 or 3, and ``labels`` (n,) of integers or strings.
        cache: folder of downloads and of unpacked arrays.

    Raises:
        SourceError: there is no such source, or it is not laid out as it should be.
    """
    if spec.source in CATALOGUE:
        entry = CATALOGUE[spec.source]
        return _array_source(spec, fetch(spec.source, cache.resolve()), entry.classes, entry.sha256)
    path = _existing(spec.source)
    return _npz_source(spec, path, cache.resolve()) if path.is_file() else _folder_source(spec, path)


def fingerprint(spec: DataSpec) -> str:
    """sha256 of what identifies the images and their preparation.

    For the catalogue that is the hash of the data set; for a folder, the names, sizes and modification times of its
    files; for an .npz file, its size and modification time. Nothing is fetched.

    Raises:
        SourceError: there is no such source.
    """
    if spec.source in CATALOGUE:
        return _fingerprint(spec, CATALOGUE[spec.source].sha256)
    path = _existing(spec.source)
    return _fingerprint(spec, _npz_identity(path) if path.is_file() else _listing(path).identity)


def _fingerprint(spec: DataSpec, identity: str) -> str:
    # A run that trains on some of the images reads them from the shards of all.
    decisive = spec.model_dump(mode="json", exclude={"source", "max_bad_fraction", "per_class"}) | {
        "identity": identity
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _npz_identity(path: Path) -> str:
    status = path.stat()
    return hashlib.sha256(f"{path}\0{status.st_size}\0{status.st_mtime_ns}".encode()).hexdigest()


def _existing(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".npz"):
        return path.resolve()
    if path.exists():
        raise SourceError(f"{source}: neither a folder nor an .npz file", cure="give the folder that holds the images")
    near = difflib.get_close_matches(source.lower(), CATALOGUE, n=1)
    names = ", ".join(CATALOGUE)
    raise SourceError(
        f"{source}: neither a data set of the catalogue nor a folder or .npz file that exists",
        cure=f"did you mean {near[0]}?" if near else f"give a path, or one of {names}",
    )


@dataclass(frozen=True)
class _Listing:
    classes: tuple[str, ...]
    files: tuple[str, ...]  # below the root, by class and then by name
    labels: tuple[int, ...]
    ignored: int
    identity: str


def _listing(root: Path) -> _Listing:
    """The image files below each class folder, in a fixed order; hidden files and folders are passed over."""
    visible = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    folders = [entry for entry in visible if entry.is_dir()]
    if not folders:
        raise SourceError(f"{root}: no class folders in it", cure="put the images into one folder for each class")
    ignored = len(visible) - len(folders)
    files: list[str] = []
    labels: list[int] = []
    identity = hashlib.sha256(f"{root}\n".encode(errors="surrogateescape"))
    for label, folder in enumerate(folders):
        for path in _visible_files(folder):
            name = os.path.relpath(path, root)
            status = _regular(path) if path.lower().endswith(SUFFIXES) else None
            if status is None:
                ignored += 1
                continue
            files.append(name)
            labels.append(label)
            identity.update(os.fsencode(name) + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        if label not in labels[-1:]:
            raise SourceError(
                f"{root}: class {folder.name!r} has no images ({', '.join(SUFFIXES)})",
                cure="fill its folder or remove it",
            )
    classes = _checked_classes(root, tuple(folder.name for folder in folders))
    return _Listing(classes, tuple(files), tuple(labels), ignored, identity.hexdigest())


def _visible_files(folder: Path) -> Iterator[str]:
    for current, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(current, name) for name in sorted(names) if not name.startswith("."))


def _regular(path: str) -> os.stat_result | None:
    """The status of a regular file, through links; None for a broken link, a pipe or a socket."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _checked_classes(path: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    if len(classes) < 2:
        raise SourceError(f"{path}: only one class, {classes[0]!r}", cure="give at least two")
    return classes


def _folder_source(spec: DataSpec, root: Path) -> FolderSource:
    listing = _listing(root)
    return FolderSource(
        classes=listing.classes,
        image=_shape(spec, spec.size or _first_side(root, listing.files, spec.channels)),
        fingerprint=_fingerprint(spec, listing.identity),
        ignored=listing.ignored,
        root=root,
        files=listing.files,
        labels=listing.labels,
    )


def _first_side(root: Path, files: tuple[str, ...], channels: int) -> int:
    """The shorter side of the first image that can be decoded: what a folder's images become by default."""
    reason = "there are none"
    for name in files:
        try:
            data = _read(root / name)
            side = shorter_side(data)
            decode(data, side, channels)
        except CorruptImageError as error:
            reason = f"{name}: {error}"
        else:
            return side
    raise SourceError(f"{root}: none of {len(files)} images can be decoded; the last: {reason}")


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SourceError(
            f"{path}: cannot be read: {error.strerror}", cure="leave the folder as it is until the job has read it"
        ) from None


def _npz_source(spec: DataSpec, path: Path, cache: Path) -> ArraySource:
    """Unpack an .npz file once, so that many processes can read single images of it."""
    identity = _npz_identity(path)
    unpacked = cache / f"{path.stem}-{identity[:16]}.safetensors"
    if not unpacked.is_file():
        images, labels, classes = _read_npz(path)
        encoded = np.frombuffer(json.dumps(classes).encode(), np.uint8)
        write_arrays(unpacked, {"images": images, "labels": labels, "classes": encoded})
    names = json.loads(map_arrays(unpacked)["classes"].tobytes())
    return _array_source(spec, unpacked, tuple(names), identity)


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    layout = "give arrays `images` (n, h, w) or (n, h, w, c) uint8, c = 1 or 3, and `labels` (n,)"
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["images"], file["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise SourceError(f"{path}: {error}", cure=layout) from None
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise SourceError(f"{path}: images has shape {images.shape} and type {images.dtype}", cure=layout)
    if labels.shape != (len(images),) or labels.dtype.kind not in "iuU":
        raise SourceError(
            f"{path}: labels has shape {labels.shape} and type {labels.dtype} for {len(images)} images", cure=layout
        )
    values, positions = np.unique(labels, return_inverse=True)
    return images, positions.astype(np.int64), _checked_classes(path, tuple(str(value) for value in values))


def _array_source(spec: DataSpec, path: Path, classes: tuple[str, ...], identity: str) -> ArraySource:
    _, height, width, _ = map_arrays(path)["images"].shape
    return ArraySource(
        classes=classes,
        image=_shape(spec, spec.size or min(height, width)),
        fingerprint=_fingerprint(spec, identity),
        ignored=0,
        path=path,
    )


def _shape(spec: DataSpec, side: int) -> ImageShape:
    least, greatest = SIDES
    if not least <= side <= greatest:
        raise SourceError(
            f"{spec.source}: its images are {side} pixels wide or high", cure=f"set data.size, {least} to {greatest}"
        )
    return ImageShape(spec.channels, side, side)
