"""Run every command of a README: each line of its ``sh`` blocks, in order, in a shell of its own.

A line that fails ends the run. Blocks of other languages (``console``, ``yaml``, ``text``) are not run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

TIMEOUT = 1200
# The test command runs as a step of its own, whose output is kept whole.
ELSEWHERE = {"make test"}


def commands(document: str) -> list[str]:
    """The commands of all ``sh`` blocks; a backslash at a line's end continues it."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", document, flags=re.DOTALL | re.MULTILINE):
        joined = re.sub(r"\\\n\s*", " ", block)
        for line in joined.splitlines():
            command = re.sub(r"\s+#.*$", "", line).strip()
            if command and not command.startswith("#"):
                found.append(command)
    return found


def main() -> int:
    """0 when every command succeeded."""
    listed = commands(Path(sys.argv[1]).read_text())
    if not listed:
        print("no commands found: the README has no sh block", file=sys.stderr)
        return 1
    for command in listed:
        if command in ELSEWHERE:
            continue
        print(f"$ {command}", flush=True)
        started = time.monotonic()
        # A reader activates the virtual environment once, for all lines.
        environment = {**os.environ, "PATH": f"{Path('.venv/bin').absolute()}:{os.environ['PATH']}"}
        code = subprocess.run(["bash", "-c", command], env=environment, timeout=TIMEOUT, check=False).returncode
        print(f"  → {code} after {time.monotonic() - started:.1f} s", flush=True)
        if code != 0:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
