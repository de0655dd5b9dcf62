"""``python -m services.jobs --job ID --spec JSON``: the entry point that a submitted job runs."""

from __future__ import annotations

import argparse
import json
import logging
import sys

from pipelines.errors import MongeError
from pipelines.spec import parse_spec
from services.jobs.driver import run_job
from services.jobs.follow import error_lines
from services.settings import load_settings


def main() -> int:
    """Run one job; 0 when it finished."""
    parser = argparse.ArgumentParser(prog="python -m services.jobs", description="Run one training job.")
    parser.add_argument("--job", required=True, help="id of the job")
    parser.add_argument("--spec", required=True, help="the resolved spec, as JSON")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    try:
        run_job(arguments.job, parse_spec(json.loads(arguments.spec)), load_settings())
    except MongeError as error:
        print(error_lines(error), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
