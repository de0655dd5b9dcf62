"""Repair of Ray Train's list of checkpoints: Ray starts no workers if the list is damaged or names a missing
checkpoint.
"""

from __future__ import annotations

import json
import posixpath
import re

from pyarrow.fs import FileSystem, FileType

from services.training.origin import NAME
from services.training.progress import report_stage

SNAPSHOT = "checkpoint_manager_snapshot.json"


def counted(filesystem: FileSystem, folder: str) -> frozenset[str]:
    """Return the names of the checkpoints in the list; empty if there is no list.

    Args:
        filesystem: file system of the folder.
        folder: folder of the job.
    """
    try:
        return _names(_read(filesystem, folder))
    except FileNotFoundError:
        return frozenset()


def mend(filesystem: FileSystem, folder: str) -> None:
    """Repair the list, so that Ray Train can start.

    Rename a damaged list, for example after a crash during a write: workers then search for checkpoints themselves.
    Create an empty folder in place of a missing checkpoint: workers then use another one.

    Args:
        filesystem: file system of the folder.
        folder: folder of the job.
    """
    try:
        text = _read(filesystem, folder)
        json.loads(text)
    except FileNotFoundError:
        return
    except ValueError:
        path = posixpath.join(folder, SNAPSHOT)
        filesystem.move(path, f"{path}.damaged")
        report_stage("the list of checkpoints is damaged: using the latest undamaged checkpoint in the job's folder")
        return
    for name in sorted(_names(text)):
        place = posixpath.join(folder, name)
        if filesystem.get_file_info(place).type is FileType.NotFound:
            filesystem.create_dir(place)
            report_stage(f"checkpoint {name} is missing")


def _read(filesystem: FileSystem, folder: str) -> bytes:
    with filesystem.open_input_stream(posixpath.join(folder, SNAPSHOT)) as stream:
        return bytes(stream.read())


def _names(text: bytes) -> frozenset[str]:
    # The format is not public; the names appear in quotes.
    found = re.findall(r'"([^"]*)"', text.decode(errors="replace"))
    return frozenset(name for name in found if NAME.fullmatch(name))
