"""Run the job service: ``python -m services.jobs``."""

from __future__ import annotations

import argparse
import sys

from pipelines.errors import MongeError
from services.jobs.server import serve
from services.settings import LOOPBACK


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(prog="python -m services.jobs", description=__doc__)
    parser.add_argument("--host", default=LOOPBACK)
    parser.add_argument("--port", type=int, default=8200)
    given = parser.parse_args()
    try:
        serve(given.host, given.port)
    except MongeError as error:
        sys.exit(f"monge jobs: {error}")


if __name__ == "__main__":
    main()
