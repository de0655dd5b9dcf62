"""``python -m services.transport``: the transport service as a process."""

from __future__ import annotations

import argparse
import sys

from pipelines.errors import MongeError
from services.settings import LOOPBACK
from services.transport.server import serve


def main() -> None:
    """Serve as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m services.transport", description=__doc__)
    parser.add_argument("--host", default=LOOPBACK)
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--ray", metavar="ADDRESS", help="solve on actors of this Ray cluster; by default here")
    parser.add_argument("--replicas", type=int, default=1, help="how many actors")
    parser.add_argument("--most", type=int, help="how many there may be while many problems wait; by default no more")
    parser.add_argument("--resource", type=float, default=1.0, help="how much of `transport` each actor takes")
    given = parser.parse_args()
    try:
        serve(given.host, given.port, given.ray, given.replicas, most=given.most, resource=given.resource)
    except MongeError as error:
        sys.exit(f"monge transport: {error}")


if __name__ == "__main__":
    main()
