"""Checkpoints on their way into S3, which may be away: that costs a checkpoint, and not the training."""

from __future__ import annotations

import logging
import re
import threading

import ray.train
from ray.train import Checkpoint

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
    """Uploads the checkpoints of a run, one after the other, in a thread of Ray Train."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._over.set()
        self._stored = True

    def expect(self) -> None:
        """A checkpoint is about to be handed over."""
        self._stored = False
        self._over.clear()

    def stored(self, seconds: float) -> bool:
        """Whether the latest checkpoint has been stored, within so many seconds."""
        return self._over.wait(seconds) and self._stored

    def __call__(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        """What ``checkpoint_upload_fn`` of ``ray.train.report`` is."""
        storage = ray.train.get_context().get_storage()
        try:
            uploaded: Checkpoint = storage.persist_current_checkpoint(checkpoint, name)
            self._stored = True
            return uploaded
        except OSError as error:
            # The server's words may quote what was sent, keys included.
            found = re.search(r"AWS Error (\w+)", str(error))
            why = found[1] if found else type(error).__name__
            log.warning("cannot store %s in s3://%s: %s", name, storage.experiment_fs_path, why)
            report_stage(
                f"{name} could not be stored in s3://{storage.experiment_fs_path}, what was kept before stays: {why}",
                trains=True,
            )
            return LostCheckpoint(storage.build_checkpoint_path_from_name(name), storage.storage_filesystem)
        finally:
            self._over.set()
