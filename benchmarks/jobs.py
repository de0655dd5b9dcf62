"""The job service under load: ``python -m benchmarks.jobs [--quick] [--json FILE]``.

A service with 10,000 jobs in its store (SQLite, one in ten queued) receives 200 requests per second, on a schedule that
does not wait for responses: four in five requests read (lists, jobs, logs, events), one submits. Latency counts from
the scheduled time of the request. Then ``monge jobs`` is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import httpx
import numpy as np

from benchmarks.report import Row, table, write_json
from pipelines.spec import JobSpec, load_spec
from services.jobs.documents import Submission, TokenRequest
from services.jobs.policy import Move
from services.jobs.states import State
from services.jobs.store import JobStore
from services.platform.processes import free_port, wait_until
from services.tokens import Role

CONFIG = Path(__file__).parents[1] / "configs" / "perceptron.yaml"
JOBS, RATE = 10_000, 200
QUEUED = 0.1
SUBMISSIONS = 0.2
LIMIT_P99, LIMIT_LIST = 100.0, 0.5


def fill(home: Path, spec: JobSpec, jobs: int) -> tuple[str, list[str]]:
    """Create a store with the given number of jobs; return an administrator's secret and the job ids."""
    folder = home / "jobservice"
    folder.mkdir(parents=True)
    store = JobStore(f"sqlite:///{folder / 'jobs.db'}")
    asked = TokenRequest(name="load", role=Role.ADMIN, requests_per_second=10_000, max_jobs=10**6)
    token = store.create_token(asked)
    submission = Submission(spec=spec.model_dump(mode="json"))
    made = [store.submit(spec, submission, token, None)[0].id for _ in range(jobs)]
    over = made[: round(len(made) * (1 - QUEUED))]
    for start in range(0, len(over), 500):
        store.move([Move(job, State.SUCCEEDED, "all images were seen") for job in over[start : start + 500]])
    store.close()
    (home / "token").touch(0o600)
    (home / "token").write_text(token.secret)
    return token.secret, made


async def load(url: str, secret: str, spec: JobSpec, jobs: list[str], seconds: float) -> np.ndarray:
    """Measure the milliseconds of each response."""
    draw = random.Random(0)
    submission = Submission(spec=spec.model_dump(mode="json")).model_dump()
    taken: list[float] = []

    async def ask(client: aiohttp.ClientSession, due: float) -> None:
        job = draw.choice(jobs)
        reads = [f"/v1/jobs/{job}", "/v1/jobs?limit=50", f"/v1/jobs/{job}/events", f"/v1/jobs/{job}/logs"]
        submits = draw.random() < SUBMISSIONS
        asked = client.post("/v1/jobs", json=submission) if submits else client.get(draw.choice(reads))
        async with asked as answer:
            answer.raise_for_status()
            await answer.read()
        taken.append(1e3 * (time.perf_counter() - due))

    # aiohttp is the Python client with the lowest CPU usage.
    connector = aiohttp.TCPConnector(limit=64)
    headers = {"Authorization": f"Bearer {secret}"}
    async with aiohttp.ClientSession(url, headers=headers, connector=connector) as client:
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for place in range(round(seconds * RATE)):
                due = started + place / RATE
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                group.create_task(ask(client, due))
    return np.array(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,000 jobs and 5 seconds of load")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows")
    arguments = parser.parse_args()
    jobs, seconds, repeats = (2_000, 5.0, 3) if arguments.quick else (JOBS, 30.0, 9)
    spec = load_spec(CONFIG, ["data.source=digits"])
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        secret, made = fill(home, spec, jobs)
        url = f"http://127.0.0.1:{free_port()}"
        environment = {
            **os.environ,
            "MONGE_HOME": str(home),
            "MONGE_JOBS_URL": url,
            # No process listens on this port: the benchmark measures the service, not a cluster.
            "MONGE_RAY_DASHBOARD": "http://127.0.0.1:9",
            "MONGE_MLFLOW_URI": "http://127.0.0.1:9",
        }
        command = [sys.executable, "-m", "services.jobs", "--port", url.rpartition(":")[2]]
        service = subprocess.Popen(command, env=environment)
        try:
            if not wait_until(lambda: _ready(url), timeout=60):
                sys.exit("the service did not start")
            taken = asyncio.run(load(url, secret, spec, made, seconds))
            listed = [_seconds([sys.executable, "-m", "services.cli", "jobs"], environment) for _ in range(repeats)]
        finally:
            service.terminate()
            service.wait(30)
    p99 = float(np.percentile(taken, 99))
    rows = [
        Row(f"{RATE} requests/s, {jobs:,} jobs stored, p99", p99, LIMIT_P99, "limit", "ms", 1.0),
        Row("monge jobs", statistics.median(listed), LIMIT_LIST, "limit", "s", 1.0),
    ]
    print(table(rows))
    if arguments.json:
        write_json(rows, arguments.json)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _seconds(command: list[str], environment: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
