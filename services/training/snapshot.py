"""Ray Train's list of the checkpoints that it keeps: Ray starts no worker where that list is damaged, or names a
checkpoint that is gone.
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
    """The names of the checkpoints in the list; none where there is no list.

    Args:
        filesystem: of the folder.
        folder: of the job.
    """
    try:
        return _names(_read(filesystem, folder))
    except FileNotFoundError:
        return frozenset()


def mend(filesystem: FileSystem, folder: str) -> None:
    """Let Ray Train start with what there is.

    A damaged list, as of a machine that fails while it is written, is put aside: the workers look for checkpoints
    themselves then. In place of a checkpoint that is gone an empty folder is left: the workers take another one.

    Args:
        filesystem: of the folder.
        folder: of the job.
    """
    try:
        text = _read(filesystem, folder)
        json.loads(text)
    except FileNotFoundError:
        return
    except ValueError:
        path = posixpath.join(folder, SNAPSHOT)
        filesystem.move(path, f"{path}.damaged")
        report_stage("the list of this job's checkpoints is damaged: the latest whole one in its folder is taken")
        return
    for name in sorted(_names(text)):
        place = posixpath.join(folder, name)
        if filesystem.get_file_info(place).type is FileType.NotFound:
            filesystem.create_dir(place)
            report_stage(f"checkpoint {name} is gone")


def _read(filesystem: FileSystem, folder: str) -> bytes:
    with filesystem.open_input_stream(posixpath.join(folder, SNAPSHOT)) as stream:
        return bytes(stream.read())


def _names(text: bytes) -> frozenset[str]:
    # Its format is not public; the names stand there in quotes.
    found = re.findall(r'"([^"]*)"', text.decode(errors="replace"))
    return frozenset(name for name in found if NAME.fullmatch(name))
