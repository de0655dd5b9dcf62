"""Opening of the source of a data spec, whose kind is detected from its files.

Sources are sent between processes on the same file system; they hold file names and positions, not pixels.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from pipelines.data.catalogue import CATALOGUE, NAMES, fetch
from pipelines.data.sources.arrays import array_source, npz_identity, open_npz
from pipelines.data.sources.base import Source, identity_of, prepared
from pipelines.data.sources.characters import character_identity, open_characters
from pipelines.data.sources.folder import FolderFiles, listing, look, open_folder
from pipelines.data.sources.parquet import open_parquets
from pipelines.data.sources.tar import open_tars
from pipelines.errors import SourceError
from pipelines.spec import CHARACTERS, CharactersSpec, DataSpec

__all__ = ["FILE_SUFFIXES", "Source", "fingerprint", "open_source"]

FILE_SUFFIXES = (".npz", ".tar", ".parquet")
"""Suffixes of single files that are sources."""


def open_source(spec: DataSpec, cache: Path) -> Source:
    """Open the source of a data spec; a source of the catalogue is fetched if it is not in the cache.

    Args:
        spec: ``source`` is a catalogue name; an .npz file with arrays ``images`` (n, h, w) or (n, h, w, c) uint8,
            c = 1 or 3, and ``labels`` (n,) of integers or strings; a .tar or .parquet file; or a folder of image
            files, tar files or Parquet files.
        cache: folder of downloads and of unpacked arrays.

    Raises:
        SourceError: the source does not exist, or has a wrong layout.
    """
    if spec.source == CHARACTERS:
        return open_characters(spec, cache.resolve())
    if spec.source in CATALOGUE:
        entry = CATALOGUE[spec.source]
        return array_source(spec, fetch(spec.source, cache.resolve()), entry.classes, entry.sha256)
    path = _existing(spec.source)
    if path.suffix.lower() == ".npz" and path.is_file():
        return open_npz(spec, path, cache.resolve())
    root, found = _found(path)
    if found.tars:
        ignored = found.others + len(found.tables)
        return open_tars(spec, root, found.tars, ignored, identity_of(root, found.tars))
    if found.parquets:
        ignored = found.others + len(found.tables)
        return open_parquets(spec, root, found.parquets, ignored, identity_of(root, found.parquets))
    return open_folder(spec, root, found)


def fingerprint(spec: DataSpec) -> str:
    """sha256 of everything that identifies the images and their preparation.

    For a source of the catalogue, this includes the hash of the data set or of its components; otherwise the names,
    sizes and modification times of the files. Nothing is fetched.

    Raises:
        SourceError: the source does not exist.
    """
    if spec.source == CHARACTERS:
        return prepared(spec, character_identity(spec.characters or CharactersSpec()))
    if spec.source in CATALOGUE:
        return prepared(spec, CATALOGUE[spec.source].sha256)
    path = _existing(spec.source)
    if path.suffix.lower() == ".npz" and path.is_file():
        return prepared(spec, npz_identity(path))
    root, found = _found(path)
    archives = found.tars or found.parquets
    return prepared(spec, identity_of(root, archives) if archives else listing(root, found).identity)


def _found(path: Path) -> tuple[Path, FolderFiles]:
    """The folder of a source and its files, of one kind.

    Raises:
        SourceError: they are of several kinds.
    """
    if path.is_file():
        is_tar = path.suffix.lower() == ".tar"
        return path.parent, FolderFiles([], [path.name] * is_tar, [path.name] * (not is_tar), [], 0)
    found = look(path)
    kinds = {"image files": found.images, "tar files": found.tars, "Parquet files": found.parquets}
    held = {kind: names for kind, names in kinds.items() if names}
    if len(held) > 1:
        named = ", ".join(f"{len(names)} {kind} ({names[0]})" for kind, names in held.items())
        raise SourceError(
            f"{path}: holds several kinds of sources: {named}",
            hint="give the folder or the file of one of them, or move the others away",
        )
    return path, found


def _existing(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix.lower() in FILE_SUFFIXES):
        return path.resolve()
    if path.exists():
        raise SourceError(
            f"{source}: neither a folder nor a file in {', '.join(FILE_SUFFIXES)}",
            hint="give the folder that holds the images",
        )
    near = difflib.get_close_matches(source.lower(), NAMES, n=1)
    names = ", ".join(NAMES)
    raise SourceError(
        f"{source}: neither a data set of the catalogue nor a folder or {', '.join(FILE_SUFFIXES)} file that exists",
        hint=f"did you mean {near[0]}?" if near else f"give a path, or one of {names}",
    )
