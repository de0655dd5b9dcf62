"""Fencing: only the latest attempt of a job may write.

A driver that lost its cluster may return while the next attempt runs. Each attempt writes an empty file, named by its
number, next to the job's checkpoints, so that any process can find the latest attempt without a lock.
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
    """Fencing of one attempt against other attempts of the job.

    Args:
        jobs: address of all jobs: a folder that all processes share, or an S3 address.
        job: id of the job.
        attempt: number of this attempt, 0 for work without attempts.
        settings: settings of S3.
    """

    def __init__(self, jobs: str, job: str, attempt: int, settings: Settings) -> None:
        hasty = hurried(settings)
        self._store = open_storage(f"{jobs}/{job}/attempts", hasty)
        self._attempt = attempt
        self._away = False

    def claim(self) -> None:
        """Write the file of this attempt; earlier attempts may no longer write.

        Raises:
            SupersededError: a later attempt has started.
            StorageError: the attempts cannot be listed or written.
        """
        self.require()
        self._store.write(str(self._attempt), b"")

    def require(self) -> None:
        """Raise unless this is the latest attempt.

        Raises:
            SupersededError: a later attempt has started.
            StorageError: the attempts cannot be listed.
        """
        self._away = True
        latest = self._latest()
        self._away = False
        if latest > self._attempt:
            raise SupersededError(f"attempt {self._attempt} was superseded by attempt {latest}")

    def require_if_seen(self) -> None:
        """Call :meth:`require`, but continue if the attempts cannot be listed.

        After a failure, skip this check until :meth:`require` succeeds: each check would wait for all its retries.

        Raises:
            SupersededError: a later attempt has started.
        """
        if self._away:
            return
        try:
            self.require()
        except StorageError as error:
            log.warning("cannot check whether a later attempt has started: %s", error.args[0])

    def holds(self) -> bool:
        """Return whether this is known to be the latest attempt."""
        try:
            return self._latest() <= self._attempt
        except StorageError:
            return False

    def _latest(self) -> int:
        try:
            keys = [found.key for page in self._store.pages() for found in page]
        except ObjectNotFoundError:
            if not isinstance(self._store, FolderStorage):
                raise  # the bucket does not exist
            return 0
        return max((int(key) for key in keys if key.isdecimal()), default=0)
