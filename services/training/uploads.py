"""Upload of checkpoints to storage that may be full or unreachable: a failure loses a checkpoint, not the training."""

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
    """A checkpoint that was not stored, for Ray Train to skip.

    ``ray.train.report`` requires a checkpoint from ``checkpoint_upload_fn``. This one is false, which the worker
    treats as none, and it unpickles as None in the controller, which counts checkpoints that are not None.
    """

    def __bool__(self) -> bool:
        return False

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class Uploads:
    """Uploads the checkpoints of a run one at a time, in a thread of Ray Train.

    Args:
        address: folder or S3 address of the checkpoints.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._over = threading.Event()
        self._over.set()
        self._stored, self._expected = True, ""

    def expect(self, name: str) -> None:
        """Announce the name of the next checkpoint."""
        self._expected, self._stored = name, False
        self._over.clear()

    def stored(self, seconds: float) -> bool:
        """Return whether the latest checkpoint has been stored within ``seconds`` seconds."""
        return self._over.wait(seconds) and self._stored

    def __call__(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        """Upload a checkpoint; the ``checkpoint_upload_fn`` of ``ray.train.report``."""
        storage = ray.train.get_context().get_storage()
        try:
            uploaded: Checkpoint = storage.persist_current_checkpoint(checkpoint, name)
            self._stored = name == self._expected
            return uploaded
        except OSError as error:
            why = self._reason(error)
            log.warning("cannot store %s in %s: %s", name, self._address, why)
            told = f"{name} could not be stored in {self._address}; earlier checkpoints are kept: {why}"
            report_stage(told, trains=True)
            lost = LostCheckpoint(storage.build_checkpoint_path_from_name(name), storage.storage_filesystem)
            if lost.filesystem is not None:
                with suppress(OSError):  # delete partial files
                    lost.filesystem.delete_dir(lost.path)
            return lost
        finally:
            if name == self._expected:  # an earlier upload may end after this one was announced
                self._over.set()

    def _reason(self, error: OSError) -> str:
        if not self._address.startswith(SCHEME):
            return str(error)
        # The server's message may quote the request, including keys.
        found = re.search(r"AWS Error (\w+)", str(error))
        return found[1] if found else type(error).__name__
