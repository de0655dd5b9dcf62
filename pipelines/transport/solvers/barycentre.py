"""Wasserstein barycentres of weighted sets of points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipelines.errors import NotConvergedError, ProblemError
from pipelines.randomness import step_generator
from pipelines.transport.plan import TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve as transport

MAX_STEPS = 100


@dataclass(frozen=True, eq=False)
class Barycentre:
    """A barycentre, and a certified plan from it to each set.

    Attributes:
        points: (k, d) float64, with equal weights.
        objective: ``Σ_s λ_s W₂²(points, set_s)``; the certificate of each plan proves its term.
        plans: plans from the points to each set.
        steps: number of steps of the fixed-point iteration.
    """

    points: np.ndarray
    objective: float
    plans: list[TransportPlan]
    steps: int


def solve(
    sets: Sequence[np.ndarray],
    *,
    size: int,
    weights: Sequence[float] | None = None,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> Barycentre:
    """Compute points of equal weight that minimise the mean squared distance to several sets.

    Cuturi & Doucet (2014), algorithm 2: each point moves to the mean of its images under the plans, which never
    increases the objective. The objective is not convex in the points, so the result is a stationary point. The
    distances at the result are certified.

    Args:
        sets: sets of points, each (n_s, d), with equal weights.
        size: number of points of the barycentre.
        weights: λ_s ≥ 0, normalised to sum to 1; equal by default.
        tolerance: relative decrease of the objective below which the iteration stops.
        seed: seed for the initial points, which are drawn from all sets.

    Raises:
        ProblemError: if there are no sets, or the weights do not match them.
        NotConvergedError: if the objective still decreases after the maximum number of steps.
    """
    mass = np.full(len(sets), 1.0) if weights is None else np.asarray(weights, dtype=np.float64)
    if not len(sets) or mass.shape != (len(sets),) or (mass < 0).any() or not mass.sum() > 0 or size < 1:
        raise ProblemError(
            f"{len(sets)} sets, {size} points and weights {weights} received", hint="give one weight ≥ 0 for each set"
        )
    mass = mass / mass.sum()
    clouds = [np.asarray(cloud, dtype=np.float64).reshape(len(cloud), -1) for cloud in sets]
    pool = np.concatenate(clouds)
    chosen = torch.randint(len(pool), (size,), generator=step_generator(seed, 0, "barycentre")).numpy()
    points = pool[chosen]
    last = np.inf
    for step in range(1, MAX_STEPS + 1):
        plans = [transport(TransportProblem.between(points, cloud)) for cloud in clouds]
        objective = float(mass @ [plan.certificate.primal for plan in plans])
        if last - objective <= tolerance * max(abs(objective), 1e-12):
            return Barycentre(points, objective, plans, step)
        last = objective
        means = [_means(plan, cloud) for plan, cloud in zip(plans, clouds, strict=True)]
        points = np.tensordot(mass, means, 1)
    raise NotConvergedError(
        f"the barycentre still moves after {MAX_STEPS} steps, objective {last:g}", hint="raise the tolerance"
    )


def _means(plan: TransportPlan, cloud: np.ndarray) -> np.ndarray:
    """Compute the mean target of each point under the plan."""
    rows, columns, mass = plan.entries()
    sums = np.zeros((plan.shape[0], cloud.shape[1]))
    np.add.at(sums, rows, mass[:, None] * cloud[columns])
    return sums * plan.shape[0]
