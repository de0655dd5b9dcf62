"""Cost of the transport service, compared with solving in process and with training without plans.

``python -m benchmarks.service [--quick] [--json FILE]``; both sides of each row are measured in turns, in one run.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

# Ray reads these at import.
os.environ |= {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}

import ray
import torch
from torch import nn

from benchmarks.report import Row, table, write_json
from pipelines.randomness import step_generator
from pipelines.transport.planner import Planner
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve
from pipelines.transport.stream import CouplingStream
from services.settings import LOOPBACK, NAMESPACE
from services.transport.actor import start_replicas, stop_replicas
from services.transport.client import RayPlanner

PROMISED = 4096
"""Number of points from which the transfer must be short compared with the solve; at 1024 it takes as long."""

PLANS = 4
"""Number of plans in one round of the training benchmark."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller and fewer, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    given = parser.parse_args()
    with cluster():
        planner = RayPlanner("benchmark", deadline=300)
        rows = [
            *(answer(planner, n, 784, 5) for n in ((512, 1024) if given.quick else (1024, PROMISED))),
            stall(planner, pool=1024 if given.quick else 2048, batch=128, rounds=1 if given.quick else 9),
        ]
    print(table(rows))
    if given.json:
        write_json(rows, given.json)


@contextmanager
def cluster() -> Iterator[None]:
    """Run a Ray cluster on loopback with one replica of the service."""
    folder = tempfile.mkdtemp(prefix="ray-")
    ray.init(
        num_cpus=2,
        resources={"transport": 1},
        object_store_memory=512 * 2**20,
        include_dashboard=False,
        namespace=NAMESPACE,
        logging_level=logging.WARNING,
        _node_ip_address=LOOPBACK,
        _temp_dir=folder,
    )
    created: list[str] = []
    try:
        start_replicas(timeout=120, created=created)
        yield
    finally:
        stop_replicas(created)
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def answer(planner: Planner, n: int, d: int, rounds: int) -> Row:
    """Compare a plan from the service with the same plan solved in this process; each round has new points."""
    ours, peer = [], []
    for number in range(rounds + 1):
        problem = TransportProblem.between(*points(n, d, number))
        ours.append(milliseconds(partial(planner.plan, problem)))
        peer.append(milliseconds(partial(solve, problem)))
    # The first round opens connections and starts threads.
    times = 1.2 if n >= PROMISED else math.inf
    return _row(f"plan from the service, n={n} d={d}", ours[1:], peer[1:], "in process", times)


def stall(planner: Planner, pool: int, batch: int, rounds: int) -> Row:
    """Compare a flow-matching step with plans solved ahead with the same step on independent pairs.

    A round has as many steps without plans as ``PLANS`` plans serve, then equally many steps with plans. The time
    includes waiting and the load of the solves; only the wait for the first plan of a round, which cannot overlap with
    training, is excluded. Training uses one thread, as on a machine where the service has a separate core.
    """
    torch.set_num_threads(1)
    steps = PLANS * pool // batch
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 1, 3, 1, 1)
    )
    optimizer = torch.optim.AdamW(network.parameters())

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        t = torch.rand(len(x), 1, 1, 1)
        loss = (network(x + t * (y - x)) - (y - x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def draw(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = points(pool, 784, 1000 + number)
        return x.view(-1, 1, 28, 28), y.view(-1, 1, 28, 28)

    x, y = draw(0)
    ours, peer = [], []
    for number in range(rounds + 1):
        started = time.perf_counter()
        for place in range(steps):
            rows = torch.arange(place * batch, (place + 1) * batch) % pool
            step(x[rows], y[rows])
        peer.append((time.perf_counter() - started) * 1e3 / steps)
        with CouplingStream(planner, draw, pool=pool, batch=batch, ahead=2) as stream:
            first = number * steps
            stream.at(first)
            started = time.perf_counter()
            for place in range(steps):
                pairs = stream.at(first + place)
                step(pairs.x, pairs.y)
            ours.append((time.perf_counter() - started) * 1e3 / steps)
    return _row(f"training step along plans of {pool}", ours[1:], peer[1:], "without plans", 1.02)


def points(n: int, d: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise, and a cloud with a spectrum like that of images: a few directions have most of the variance."""
    generator = step_generator(0, number, "benchmark")
    spectrum = 1 / (1 + torch.arange(d))
    x = torch.randn(n, d, generator=generator)
    return x, torch.randn(n, d, generator=generator) * spectrum.sqrt()


def milliseconds(call: Callable[[], object]) -> float:
    """Measure the duration of a call."""
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def _row(name: str, ours: list[float], peer: list[float], peer_name: str, times: float) -> Row:
    """Create a row from medians over the rounds, because the speed of the machine varies; ``times`` is the limit."""
    ratio = statistics.median(mine / theirs for mine, theirs in zip(ours, peer, strict=True))
    base = statistics.median(peer)
    return Row(name, ratio * base, base, peer_name, "ms", 1 / times)


if __name__ == "__main__":
    main()
