"""Which attempt at a job may write: the latest.

A driver that was cut off from its cluster may come back while the next attempt runs. Attempts leave an empty file each
beside the job's checkpoints, named by their numbers, so that whoever looks finds the latest without a lock.
"""

from __future__ import annotations

import logging

from pipelines.errors import ObjectNotFoundError, StorageError, SupersededError
from services.settings import Settings
from services.storage.local import FolderStorage
from services.storage.open import open_storage
from services.storage.s3 import hurried

log = logging.getLogger(__name__)


class Fence:
    """What one attempt at a job knows of the others.

    Args:
        jobs: address of all jobs: a folder that all their processes see, or one in S3.
        job: id of the job.
        attempt: number of this attempt, 0 for work that has no attempts.
        settings: of S3.
    """

    def __init__(self, jobs: str, job: str, attempt: int, settings: Settings) -> None:
        hasty = hurried(settings)
        self._store = open_storage(f"{jobs}/{job}/attempts", hasty)
        self._attempt = attempt
        self._away = False

    def claim(self) -> None:
        """Leave the file of this attempt: those before it may write no more.

        Raises:
            SupersededError: a later attempt has begun already.
            StorageError: the attempts cannot be listed or written.
        """
        self.require()
        self._store.write(str(self._attempt), b"")

    def require(self) -> None:
        """Go on only if this is the latest attempt.

        Raises:
            SupersededError: it is not.
            StorageError: the attempts cannot be listed.
        """
        self._away = True
        latest = self._latest()
        self._away = False
        if latest > self._attempt:
            raise SupersededError(f"attempt {self._attempt} was given up: attempt {latest} has begun")

    def require_if_seen(self) -> None:
        """As :meth:`require`, but go on where the attempts cannot be listed.

        They are not looked for again until :meth:`require` has found them: each look would wait for all its retries.

        Raises:
            SupersededError: this is not the latest attempt.
        """
        if self._away:
            return
        try:
            self.require()
        except StorageError as error:
            log.warning("cannot see whether a later attempt has begun: %s", error.args[0])

    def holds(self) -> bool:
        """Whether this is known to be the latest attempt."""
        try:
            return self._latest() <= self._attempt
        except StorageError:
            return False

    def _latest(self) -> int:
        try:
            keys = [found.key for page in self._store.pages() for found in page]
        except ObjectNotFoundError:
            if not isinstance(self._store, FolderStorage):
                raise  # there is no bucket
            return 0
        return max((int(key) for key in keys if key.isdecimal()), default=0)
