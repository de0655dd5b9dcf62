"""Entropic plans compared with public solvers: ``python -m benchmarks.transport_entropic [--quick] [--json FILE]``.

Costs are squared Euclidean, and all times include the cost matrix. Every solver stops at an L1 marginal error of 1e-3.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ot
import torch

from benchmarks import images
from benchmarks.report import Row, in_turns, table, write_json
from pipelines.transport.divergence import sinkhorn_divergence
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solvers import sharded, sinkhorn
from pipelines.transport.solvers.iteration import Kernel
from pipelines.transport.solvers.rows import Working

ERROR = 1e-3
STREAMED = 16384
DIMENSION = 64


def pot_solver(x: np.ndarray, y: np.ndarray, epsilon: float) -> tuple[str, Callable[[], object]]:
    """Return POT's Sinkhorn solver in float64 if its kernel does not underflow, else the log-domain solver.

    POT stops by the L2 norm of the error, which is √(π / 2n) times the L1 norm for Gaussian errors.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tried = ot.sinkhorn([], [], ot.dist(x, y), epsilon, numItermax=20, stopThr=0, warn=False)
    held = np.isfinite(tried).all() and np.abs(tried.sum() - 1) < 0.5
    method = "sinkhorn" if held else "sinkhorn_log"
    threshold = ERROR * np.sqrt(np.pi / (2 * len(x)))
    return f"POT {method}", lambda: ot.sinkhorn(
        [], [], ot.dist(x, y), epsilon, method=method, numItermax=2000, stopThr=threshold, warn=False
    )


def dense_rows(noise: np.ndarray, pictures: np.ndarray, quick: bool) -> list[Row]:
    n = 2048 if quick else 4096
    clouds = [("noise", noise[:n])]
    if not quick:
        clouds.append(("generated", images.blurred(pictures[n : 2 * n])))
    rows = []
    for (label, x), fraction in itertools.product(clouds, (0.01, 0.002)):
        y = pictures[:n]
        epsilon = fraction * float(ot.dist(x, y).mean())
        calls: dict[str, Callable[[], object]] = dict([pot_solver(x, y, epsilon)])
        if importlib.util.find_spec("ott"):
            calls["OTT-JAX"] = ott_solver(x, y, epsilon)
        problem = TransportProblem.between(x, y, epsilon=epsilon)
        mine, *theirs = in_turns(
            lambda p=problem: sinkhorn.solve(p, tolerance=ERROR),  # type: ignore[misc]
            *calls.values(),
            repeats=1,
        )
        name = f"Sinkhorn, n={n}, {label}, epsilon={fraction:g} mean"
        rows += [Row(name, mine, peer, who, "ms", 4.0) for who, peer in zip(calls, theirs, strict=True)]
    return rows


def ott_solver(x: np.ndarray, y: np.ndarray, epsilon: float) -> Callable[[], object]:
    """Return OTT's compiled Sinkhorn solver; the time excludes compilation."""
    import jax
    from ott.geometry import pointcloud
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn as theirs

    solver = theirs.Sinkhorn(threshold=ERROR, max_iterations=2000)
    run = jax.jit(lambda a, b: solver(linear_problem.LinearProblem(pointcloud.PointCloud(a, b, epsilon=epsilon))).f)
    left, right = jax.numpy.asarray(x), jax.numpy.asarray(y)
    return lambda: run(left, right).block_until_ready()


def streaming_rows(quick: bool) -> list[Row]:
    """Measure one iteration over points whose kernel is never stored."""
    n = 8192 if quick else STREAMED
    x, y = images.noise(n, DIMENSION), 0.9 * images.noise(n, DIMENSION, seed=2) + 0.1
    epsilon = 0.05 * 2 * DIMENSION
    working = Working.of(TransportProblem.between(x, y, epsilon=epsilon))
    weights = torch.full((n,), 1 / n, dtype=torch.float64)
    kernel = Kernel(working.rows(None), weights, weights, keep=False)
    g = torch.zeros(n, dtype=torch.float64)
    f = kernel.transform(g)

    def lazily(iterations: int) -> object:
        return ot.bregman.empirical_sinkhorn(
            x, y, epsilon, isLazy=True, batchSize=512, numIterMax=iterations, stopThr=0, warn=False
        )

    calls: dict[str, Callable[[], object]] = {"torch, block by block, two passes": lambda: textbook(x, y, epsilon)}
    if importlib.util.find_spec("ott"):
        calls["OTT-JAX"] = ott_iteration(x, y, epsilon)
    mine, *theirs = in_turns(lambda: kernel.iterate(f, g, epsilon), *calls.values(), repeats=2)
    rows = [
        Row(f"streaming, n={n}, an iteration", mine, peer, who, "ms", 3.0)
        for who, peer in zip(calls, theirs, strict=True)
    ]
    if not quick:
        started = time.perf_counter()
        lazily(2)
        rows.append(Row(rows[0].name, mine, (time.perf_counter() - started) / 2 * 1e3, "POT lazy", "ms", 3.0))
    # Lower bound of an iteration: the product and the exponentials.
    block, left = torch.empty(512, n), torch.from_numpy(x)
    right = torch.from_numpy(y).T.contiguous()

    def floor() -> None:
        for start in range(0, n, 512):
            torch.mm(left[start : start + 512], right, out=block).exp2_()

    again, least = in_turns(lambda: kernel.iterate(f, g, epsilon), floor, repeats=2)
    return [*rows, Row(f"streaming, n={n}, against its floor", again, 1.2 * least, "1.2 × product and exp2", "ms", 1.0)]


def textbook(x: np.ndarray, y: np.ndarray, epsilon: float) -> torch.Tensor:
    """Run both half-steps by log-sum-exp over blocks of 64 rows."""

    def half(left: torch.Tensor, right: torch.Tensor, potential: torch.Tensor) -> torch.Tensor:
        squares = (right * right).sum(1)
        return torch.cat(
            [torch.logsumexp((potential - squares + 2 * part @ right.T) / epsilon, 1) for part in left.split(64)]
        )

    left, right = torch.from_numpy(x), torch.from_numpy(y)
    return half(right, left, -epsilon * half(left, right, torch.zeros(len(y))))


def ott_iteration(x: np.ndarray, y: np.ndarray, epsilon: float) -> Callable[[], object]:
    """Return one blockwise iteration of OTT, with both half-steps."""
    import jax
    from ott.geometry import pointcloud

    def step(a: jax.Array, b: jax.Array) -> jax.Array:
        geometry = pointcloud.PointCloud(a, b, epsilon=epsilon, batch_size=512)
        zero_f, zero_g = jax.numpy.zeros(len(x)), jax.numpy.zeros(len(y))
        f = geometry.update_potential(zero_f, zero_g, jax.numpy.full(len(x), -np.log(len(x))), axis=1)
        return geometry.update_potential(f, zero_g, jax.numpy.full(len(y), -np.log(len(y))), axis=0)

    run = jax.jit(step)
    left, right = jax.numpy.asarray(x), jax.numpy.asarray(y)
    return lambda: run(left, right).block_until_ready()


def divergence_rows(quick: bool) -> list[Row]:
    """Measure the Sinkhorn divergence and its gradient."""
    if not importlib.util.find_spec("geomloss"):
        return []
    from geomloss import SamplesLoss

    n = 1000 if quick else 2000
    x, y = torch.from_numpy(images.noise(n, DIMENSION)), torch.from_numpy(images.noise(n, DIMENSION, seed=2) + 0.2)
    epsilon = 0.05 * 2 * DIMENSION
    # GeomLoss uses half the squared distance as cost, and a length as epsilon.
    theirs = SamplesLoss("sinkhorn", p=2, blur=(epsilon / 2) ** 0.5, scaling=0.9, backend="tensorized")

    def gradient(of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        points = x.clone().requires_grad_()
        of(points).backward()

    mine, peer = in_turns(
        lambda: gradient(lambda p: sinkhorn_divergence(p, y, epsilon=epsilon, tolerance=ERROR)),
        lambda: gradient(lambda p: theirs(p, y)),
        repeats=3,
    )
    return [Row(f"divergence and gradient, n={n}", mine, peer, "GeomLoss, scaling 0.9", "ms", 1.0)]


def twin_rows(pictures: np.ndarray) -> list[Row]:
    """Measure plans between images and blurred copies, where the plan is the identity."""
    from scipy.ndimage import gaussian_filter

    n = len(pictures)
    x = pictures
    twins = gaussian_filter(x.reshape(-1, 28, 28), (0, 0.5, 0.5)).reshape(n, -1)
    problem = TransportProblem.between(x, twins)
    working = Working.of(problem)
    weights = torch.full((n,), 1 / n)
    epsilon = 0.002 * working.unit * sinkhorn.scale_of(Kernel(working.rows(None), weights, weights, keep=False))
    started = time.perf_counter()
    plan = sharded.solve(torch.from_numpy(x), torch.from_numpy(twins), epsilon=epsilon)
    print(
        f"  twins, n={n}: {time.perf_counter() - started:.1f} s, {plan.certificate.iterations} iterations", flush=True
    )
    found = torch.cat([block.argmax(1) for _, block in plan.gibbs().blocks()])
    missed = float((found != torch.arange(n)).double().mean())
    return [Row(f"blurred twins not recognised, n={n}", max(100 * missed, 1e-6), 0.1, "limit", "%", 1.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sets, fewer repeats, under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows")
    parser.add_argument("--only", choices=["dense", "streaming", "divergence", "twins"], help="one section")
    parser.add_argument("--twins", type=int, default=16384, help="images of the last section; Fashion-MNIST has 60000")
    parser.add_argument("--images", type=Path, default=images.FASHION_MNIST, help="an IDX file of 28 × 28 images")
    arguments = parser.parse_args()
    quick = arguments.quick
    pictures, source = images.images(arguments.images, 4096 if quick else max(8192, arguments.twins))
    print(f"{source}; {torch.get_num_threads()} threads", flush=True)
    absent = [
        label
        for module, label in (("ott", "OTT-JAX"), ("geomloss", "GeomLoss"))
        if not importlib.util.find_spec(module)
    ]
    if absent:
        print(f"not installed, left out: {', '.join(absent)}")
    sections: dict[str, Callable[[], list[Row]]] = {
        "dense": lambda: dense_rows(images.noise(4096, 784), pictures, quick),
        "streaming": lambda: streaming_rows(quick),
        "divergence": lambda: divergence_rows(quick),
        "twins": lambda: twin_rows(pictures[: 2048 if quick else arguments.twins]),
    }
    rows: list[Row] = []
    for name, section in sections.items():
        if arguments.only in (None, name):
            found = section()
            print(table(found), flush=True)
            rows += found
    if arguments.json:
        write_json(rows, arguments.json)


if __name__ == "__main__":
    main()
