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
        with filesystem.open_input_stream(posixpath.join(folder, SNAPSHOT)) as stream:
            text = stream.read().decode(errors="replace")
    except FileNotFoundError:
        return frozenset()
    # Its format is not public; the names stand there in quotes.
    return frozenset(name for name in re.findall(r'"([^"]*)"', text) if NAME.fullmatch(name))


def mend(filesystem: FileSystem, folder: str) -> None:
    """Let Ray Train start with what there is.

    A damaged list, as of a machine that fails while it is written, is put aside: the workers look for checkpoints
    themselves then. In place of a checkpoint that is gone an empty folder is left: the workers take another one.

    Args:
        filesystem: of the folder.
        folder: of the job.
    """
    path = posixpath.join(folder, SNAPSHOT)
    try:
        with filesystem.open_input_stream(path) as stream:
            json.loads(stream.read())
    except FileNotFoundError:
        return
    except ValueError:
        filesystem.move(path, f"{path}.damaged")
        report_stage("the list of this job's checkpoints is damaged: the latest whole one in its folder is taken")
        return
    for name in sorted(counted(filesystem, folder)):
        place = posixpath.join(folder, name)
        if filesystem.get_file_info(place).type is FileType.NotFound:
            filesystem.create_dir(place)
            report_stage(f"checkpoint {name} is gone")
