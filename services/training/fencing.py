"""Which attempt at a job may write: the latest.

A driver that was cut off from its cluster may come back while the next attempt runs. Attempts leave a file each in the
job's folder, named by their numbers, so that whoever looks finds the latest without a lock.
"""

from __future__ import annotations

from pathlib import Path

from pipelines.errors import SupersededError


class Fence:
    """What one attempt at a job knows of the others.

    Args:
        jobs: folder of all jobs, which all their processes see.
        job: id of the job.
        attempt: number of this attempt, 0 for work that has no attempts.
    """

    def __init__(self, jobs: Path, job: str, attempt: int) -> None:
        self._folder = jobs / job / "attempts"
        self._attempt = attempt

    def claim(self) -> None:
        """Leave the file of this attempt: those before it may write no more.

        Raises:
            SupersededError: a later attempt has begun already.
        """
        self.require()
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / str(self._attempt)).touch()

    def require(self) -> None:
        """Go on only if this is the latest attempt.

        Raises:
            SupersededError: it is not.
        """
        latest = self._latest()
        if latest > self._attempt:
            raise SupersededError(f"attempt {self._attempt} was given up: attempt {latest} has begun")

    def holds(self) -> bool:
        """Whether this is the latest attempt."""
        return self._latest() <= self._attempt

    def _latest(self) -> int:
        try:
            return max((int(file.name) for file in self._folder.iterdir() if file.name.isdecimal()), default=0)
        except FileNotFoundError:
            return 0
