"""Run the transport service: ``python -m services.transport``."""

from __future__ import annotations

import argparse
import sys

from pipelines.errors import MongeError
from services.settings import LOOPBACK
from services.transport.server import serve


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(prog="python -m services.transport", description=__doc__)
    parser.add_argument("--host", default=LOOPBACK)
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--ray", metavar="ADDRESS", help="solve on this Ray cluster; by default in this process")
    parser.add_argument("--replicas", type=int, default=1, help="number of actors")
    parser.add_argument("--most", type=int, help="maximum number of actors under load; --replicas by default")
    parser.add_argument("--resource", type=float, default=1.0, help="amount of the resource `transport` per actor")
    given = parser.parse_args()
    try:
        serve(given.host, given.port, given.ray, given.replicas, most=given.most, resource=given.resource)
    except MongeError as error:
        sys.exit(f"monge transport: {error}")


if __name__ == "__main__":
    main()
