"""Logs of jobs, stored as files next to the database, so that they outlive the cluster."""

from __future__ import annotations

import re
from pathlib import Path

from services.jobs.documents import LogPage
from services.training.progress import format_line

LONGEST_LOG = 256 * 2**20
"""Maximum size of the log of an attempt in bytes; further output is dropped, and the log ends with a note."""

PAGE = 2**20
"""Maximum number of bytes of a log in one response."""

_JOB = re.compile(r"[A-Za-z0-9][\w.-]{0,199}")


class AttemptLogs:
    """A folder with one log file per attempt.

    Args:
        folder: folder of the log files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def size(self, job: str, attempt: int) -> int:
        """Return the size of the log of an attempt in bytes."""
        path = self._path(job, attempt)
        return path.stat().st_size if path.exists() else 0

    def is_whole(self, job: str, attempt: int) -> bool:
        """Return whether the log of an attempt ends with a newline."""
        path = self._path(job, attempt)
        if not self.size(job, attempt):
            return True
        with path.open("rb") as file:
            file.seek(-1, 2)
            return file.read() == b"\n"

    def append(self, job: str, attempt: int, content: bytes) -> None:
        """Append to the log of an attempt."""
        path = self._path(job, attempt)
        path.parent.mkdir(parents=True, exist_ok=True)
        size = self.size(job, attempt)
        if size >= LONGEST_LOG:
            return
        if size + len(content) > LONGEST_LOG:
            content = content[: LONGEST_LOG - size] + b"\n[monge] log size limit reached: further output is dropped\n"
        with path.open("ab") as file:
            file.write(content)

    def lines(self, job: str, attempt: int, start: int) -> tuple[list[str], int]:
        """Return the complete lines of the log of an attempt from byte ``start``, and the offset of the next line."""
        path = self._path(job, attempt)
        if not path.exists():
            return [], start
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(PAGE)
        whole = content.rfind(b"\n") + 1
        if not whole and len(content) == PAGE:  # a line longer than a page
            whole = PAGE
        return content[:whole].decode(errors="replace").splitlines(), start + whole

    def page(self, job: str, offset: int, ended: bool) -> LogPage:
        """Return a page of the log of a job.

        Args:
            job: id of the job.
            offset: byte offset into the concatenated logs of all attempts.
            ended: whether the job has ended; its last line may then lack a newline.
        """
        before, attempts = 0, self._attempts(job)
        for place, attempt in enumerate(attempts):
            size = self.size(job, attempt)
            if offset < before + size:
                lines, end = self.lines(job, attempt, max(0, offset - before))
                over = ended or place + 1 < len(attempts)
                if not lines and over:  # the last line has no newline and will not get one
                    with self._path(job, attempt).open("rb") as file:
                        file.seek(max(0, offset - before))
                        lines, end = [file.read(PAGE).decode(errors="replace")], size
                if not lines:
                    break
                shown = [one for line in lines for one in format_line(line)]
                if offset <= before and attempt > 1:
                    shown.insert(0, f"[monge] attempt {attempt}")
                over = over and before + end >= sum(self.size(job, each) for each in attempts)
                return LogPage(lines=shown, next=before + end, ended=over and ended)
            before += size
        return LogPage(lines=[], next=max(offset, 0) if attempts else 0, ended=ended)

    def _attempts(self, job: str) -> list[int]:
        if not _JOB.fullmatch(job):
            return []
        return sorted(int(path.stem) for path in (self._folder / job).glob("*.log"))

    def _path(self, job: str, attempt: int) -> Path:
        if not _JOB.fullmatch(job):
            raise ValueError(job)
        return self._folder / job / f"{attempt}.log"
