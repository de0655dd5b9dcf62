"""Checkpoints on their way into storage that may be full or away: it costs a checkpoint, and not the training."""

from __future__ import annotations

import logging
import re
import threading
from contextlib import suppress

import ray.train
from ray.train import Checkpoint

from services.storage.objects import SCHEME
from services.training.progress import report_stage

log = logging.getLogger(__name__)


class LostCheckpoint(Checkpoint):
    """A checkpoint that is not stored, for Ray Train to pass over.

    ``ray.train.report`` wants a checkpoint of whoever uploads one. This one is false, which Ray Train's worker takes
    for none, and None once it has come to its controller, which counts those that are not None.
    """

    def __bool__(self) -> bool:
        return False

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class Uploads:
    """Uploads the checkpoints of a run, one after the other, in a thread of Ray Train.

    Args:
        address: where they are stored: a folder, or one in S3.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._over = threading.Event()
        self._over.set()
        self._stored, self._expected = True, ""

    def expect(self, name: str) -> None:
        """A checkpoint of that name is about to be handed over."""
        self._expected, self._stored = name, False
        self._over.clear()

    def stored(self, seconds: float) -> bool:
        """Whether the latest checkpoint has been stored, within so many seconds."""
        return self._over.wait(seconds) and self._stored

    def __call__(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        """What ``checkpoint_upload_fn`` of ``ray.train.report`` is."""
        storage = ray.train.get_context().get_storage()
        try:
            uploaded: Checkpoint = storage.persist_current_checkpoint(checkpoint, name)
            self._stored = name == self._expected
            return uploaded
        except OSError as error:
            why = self._reason(error)
            log.warning("cannot store %s in %s: %s", name, self._address, why)
            told = f"{name} could not be stored in {self._address}, what was kept before stays: {why}"
            report_stage(told, trains=True)
            lost = LostCheckpoint(storage.build_checkpoint_path_from_name(name), storage.storage_filesystem)
            if lost.filesystem is not None:
                with suppress(OSError):  # what there is of it takes room
                    lost.filesystem.delete_dir(lost.path)
            return lost
        finally:
            if name == self._expected:  # one before it may end later than this one is expected
                self._over.set()

    def _reason(self, error: OSError) -> str:
        if not self._address.startswith(SCHEME):
            return str(error)
        # The server's words may quote what was sent, keys included.
        found = re.search(r"AWS Error (\w+)", str(error))
        return found[1] if found else type(error).__name__
