"""Many concurrent clients and a replica that dies: every request gets a correct response or a typed error.

``MONGE_LOAD_SECONDS`` sets the duration; 10 by default.
"""

import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipelines.errors import MongeError
from pipelines.transport.plan import TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.true_cost import cost_matrix
from services.settings import NAMESPACE
from services.transport.client import RayPlanner
from services.transport.limits import Limits

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("MONGE_LOAD_SECONDS", "10"))
CLIENTS = 8
SLACK = 96 * 2**20
"""Maximum memory growth of a process after warm-up in bytes: arenas, caches and stacks of threads."""


def some_problem(generator: np.random.Generator) -> TransportProblem:
    n = int(generator.choice([4, 16, 64, 200], p=[0.4, 0.3, 0.2, 0.1]))
    x, y = generator.normal(size=(n, 16)), generator.normal(size=(n, 16))
    if generator.random() < 0.2:
        return TransportProblem.between(x, y[: n // 2 + 1], a=generator.random(n) + 0.1)
    return TransportProblem.between(x, y)


def check(problem: TransportProblem, plan: TransportPlan) -> None:
    """Check the plan: its marginals, its cost, and the dual bound from feasible potentials."""
    costs = cost_matrix(problem).numpy().astype(np.float64)
    rows, columns, mass = plan.entries()
    a, b = problem.source_weights(), problem.target_weights()
    np.testing.assert_allclose(np.bincount(rows, mass, minlength=len(a)), a, atol=1e-7)
    np.testing.assert_allclose(np.bincount(columns, mass, minlength=len(b)), b, atol=1e-7)
    assert plan.f is not None
    assert plan.g is not None
    scale = costs.max()
    assert (plan.f[:, None] + plan.g <= costs + 1e-5 * scale).all()
    primal, dual = float(mass @ costs[rows, columns]), float(a @ plan.f + b @ plan.g)
    assert primal - dual <= 1e-4 * scale
    assert abs(plan.certificate.primal - primal) <= 1e-5 * scale


def resident(name: str) -> float:
    import ray

    metrics = ray.get(ray.get_actor(name, namespace=NAMESPACE).metrics.remote(), timeout=30)
    samples = [sample for metric in metrics for sample in metric.samples]
    return next(s.value for s in samples if s.name == "monge_transport_process_resident_memory_bytes")


def test_every_request_is_answered_right_or_refused_by_name(ray_cluster: None) -> None:
    import ray

    from services.transport.actor import replica_names, start_replicas, stop_replicas

    created: list[str] = []
    start_replicas(2, Limits(queue=16, queue_per_client=4, cache_bytes=2**20), resource=0.5, created=created)
    until = time.monotonic() + SECONDS
    counts: Counter[str] = Counter()
    lock = threading.Lock()

    def ask(client: int) -> None:
        generator = np.random.default_rng(client)
        planner = RayPlanner(f"client-{client}", deadline=30, attempt="a")
        while time.monotonic() < until:
            problem = some_problem(generator)
            try:
                check(problem, planner.plan(problem))
                outcome = "answered"
            except MongeError as error:
                outcome = type(error).__name__
            with lock:
                counts[outcome] += 1

    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            calls = [pool.submit(ask, client) for client in range(CLIENTS)]
            threading.Event().wait(SECONDS / 4)
            survivor, victim = replica_names(2)
            warm = resident(survivor)
            threading.Event().wait(SECONDS / 4)
            ray.kill(ray.get_actor(victim, namespace=NAMESPACE), no_restart=False)
            for call in calls:
                call.result(timeout=SECONDS + 90)
        grown = resident(survivor) - warm
    finally:
        stop_replicas(created)
    print(dict(counts), f"survivor grew by {grown / 2**20:.1f} MiB")
    # An error of any other kind has ended its client, and the test.
    assert counts["answered"] > 0.9 * counts.total()
    assert grown < SLACK
