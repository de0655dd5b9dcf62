"""Image files in folders, labelled by folder names or by a table."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.data.decode import decode
from pipelines.data.sources.base import (
    SUFFIXES,
    Source,
    first_side,
    identity_of,
    is_hidden,
    is_part,
    part_of,
    prepared,
    read_image,
    shape_of,
    sorted_classes,
    stated_split,
    visible_files,
)
from pipelines.data.sources.table import TABLE_NAMES, TABLE_SUFFIXES, read_table
from pipelines.errors import SourceError
from pipelines.spec import DataSpec

_LAYOUT = "put the images into one folder for each class, or a labels.csv with columns file_name,label beside them"


@dataclass(frozen=True)
class FolderSource(Source):
    """Image files, one per image.

    Attributes:
        root: folder of the files.
        files: paths below the root; sorted by class and then by name if folders are the classes.
        labels: labels of the files.
        split: 0 for train, 1 for test; None if the source has no split.
    """

    root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    split: tuple[int, ...] | None

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        # A file name may be any bytes; the returned name must be text.
        return os.fsencode(self.files[i]).decode(errors="backslashreplace")

    def item(self, i: int) -> tuple[str, int, np.ndarray]:
        data = read_image(self.root / self.files[i])
        return self.name(i), self.labels[i], decode(data, self.image.height, self.image.channels)

    def official_split(self, start: int, stop: int) -> np.ndarray | None:
        return None if self.split is None else np.array(self.split[start:stop], dtype=np.uint8)


@dataclass(frozen=True)
class FolderFiles:
    """The files below a folder by kind, without hidden files.

    Attributes:
        images, tars, parquets, tables: paths below the folder, in a fixed order.
        others: number of all other files.
    """

    images: list[str]
    tars: list[str]
    parquets: list[str]
    tables: list[str]
    others: int


def look(root: Path) -> FolderFiles:
    """Sort the files below a folder by suffix; links are followed, pipes and sockets are ignored."""
    kinds: tuple[tuple[str, ...], ...] = (SUFFIXES, (".tar",), (".parquet",), TABLE_SUFFIXES)
    names: dict[tuple[str, ...], list[str]] = {suffixes: [] for suffixes in kinds}
    others = 0
    for path in visible_files(root):
        kind = next((suffixes for suffixes in kinds if path.lower().endswith(suffixes)), None)
        if kind is None or not _is_regular(path):
            others += 1
        else:
            names[kind].append(os.path.relpath(path, root))
    images, tars, parquets, tables = names.values()
    return FolderFiles(images, tars, parquets, tables, others)


@dataclass(frozen=True)
class Listing:
    """The images of a folder with their labels.

    Attributes:
        classes: names of the classes, by label.
        files: paths below the folder.
        labels: labels of the files.
        split: see :class:`FolderSource`.
        ignored: number of ignored files.
        identity: sha256 that identifies the files.
    """

    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]
    split: tuple[int, ...] | None
    ignored: int
    identity: str


def listing(root: Path, found: FolderFiles) -> Listing:
    """List the images of a folder with their labels.

    Raises:
        SourceError: if the images have no labels, or a table of labels is invalid.
    """
    tables = _tables(root, found)
    if tables:
        labels = _by_tables(root, found.images, tables)
        used = list(labels)
        classes = sorted_classes(list(labels.values()))
        parts = [part_of(name.partition("/")[0]) if _in_part(name) else "" for name in used]
        unused = len(found.images) - len(used) + len(found.tables) - len(tables)
    else:
        labels, classes, parts = _by_folders(root, found.images)
        used = list(labels)
        unused = len(found.images) - len(used) + len(found.tables)
    kept, split = stated_split(parts)
    files = tuple(used[i] for i in kept)
    position = {name: label for label, name in enumerate(classes)}
    return Listing(
        classes=checked_classes(root, classes),
        files=files,
        labels=tuple(position[labels[name]] for name in files),
        split=split,
        ignored=found.others + unused + len(used) - len(kept),
        identity=identity_of(root, [*tables, *files]),
    )


def open_folder(spec: DataSpec, root: Path, found: FolderFiles) -> FolderSource:
    """Open a folder of image files.

    Raises:
        SourceError: if the labels are invalid, or no image can be decoded.
    """
    listed = listing(root, found)

    def images() -> Iterator[tuple[str, bytes]]:
        return ((name, read_image(root / name)) for name in listed.files)

    return FolderSource(
        classes=listed.classes,
        image=shape_of(spec, spec.size or first_side(root, images(), spec.channels)),
        fingerprint=prepared(spec, listed.identity),
        ignored=listed.ignored,
        root=root,
        files=listed.files,
        labels=listed.labels,
        split=listed.split,
    )


def checked_classes(path: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the classes after checking that they are valid Unicode.

    Raises:
        SourceError: if a name is not valid Unicode.
    """
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise SourceError(f"{path}: the class {name!r} is not in UTF-8", hint="rename its folder") from None
    return classes


def _is_regular(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:  # a broken link
        return False


def _in_part(name: str) -> bool:
    folder, slash, _ = name.partition("/")
    return bool(slash) and is_part(folder)


def _tables(root: Path, found: FolderFiles) -> list[str]:
    """Return the tables of labels: those with a known name, or the only table of a folder without class folders."""
    named = [
        name
        for name in found.tables
        if Path(name).stem.lower() in TABLE_NAMES and ("/" not in name or (name.count("/") == 1 and _in_part(name)))
    ]
    nested = [name for name in found.images if "/" in name]
    flat = [name for name in found.tables if "/" not in name]
    if not named and len(flat) == 1 and found.images and len({name.partition("/")[0] for name in nested}) < 2:
        named = flat
    folders = [os.path.dirname(name) for name in named]
    for folder in folders:
        if folders.count(folder) > 1 or (folder and "" in folders):
            raise SourceError(
                f"{root}: several tables of labels: {', '.join(named)}", hint="leave one, or one in each split's folder"
            )
    return named


def _by_tables(root: Path, images: list[str], tables: list[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for table in tables:
        above = os.path.dirname(table)
        above = above + "/" if above else ""
        inside = [name.removeprefix(above) for name in images if name.startswith(above)]
        labels |= {above + name: label for name, label in read_table(root / table, inside).items()}
    return dict(sorted(labels.items()))


def _by_folders(root: Path, images: list[str]) -> tuple[dict[str, str], tuple[str, ...], list[str]]:
    """Return the label of each file, the classes, and the split named by the path of each file."""
    folders = _folders(root)
    if not folders:
        raise SourceError(f"{root}: no class folders and no table of labels in it", hint=_LAYOUT)
    if len(folders) == 1 and not is_part(folders[0]) and all(name.count("/") > 1 for name in images if "/" in name):
        # A single folder that contains the class folders, e.g. from an unpacked archive, is not a class.
        above = folders[0] + "/"
        if len(_folders(root / above)) > 1:
            inside = [name.removeprefix(above) for name in images if name.startswith(above)]
            held_labels, classes, parts = _by_folders(root / above, inside)
            return {above + name: label for name, label in held_labels.items()}, classes, parts
    in_parts = "train" in map(part_of, folders) and all(map(is_part, folders))
    depth = 1 if in_parts else 0
    if in_parts:
        held = sorted({f"{part}/{name}" for part in folders for name in _folders(root / part)})
        if not held:
            raise SourceError(f"{root}: no class folders below {', '.join(folders)}", hint=_LAYOUT)
    else:
        held = folders
    labels: dict[str, str] = {}
    for name in images:
        parts = name.split("/")
        if len(parts) > depth + 1:
            labels[name] = parts[depth]
    filled = set(labels.values())
    classes = tuple(sorted({folder.split("/")[-1] for folder in held}))
    for name in classes:
        if name not in filled:
            raise SourceError(
                f"{root}: class {name!r} has no images ({', '.join(SUFFIXES)})", hint="fill its folder or remove it"
            )
    order = sorted(labels, key=lambda name: labels[name])  # stable: by class, then in the order found
    parts_of = [part_of(name.partition("/")[0]) if in_parts else "" for name in order]
    return {name: labels[name] for name in order}, classes, parts_of


def _folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if not is_hidden(entry.name) and entry.is_dir())
