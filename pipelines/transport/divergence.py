"""Differentiable Sinkhorn divergence: an entropic cost between sets of points that is 0 for equal sets."""

from __future__ import annotations

from typing import Any

import torch

from pipelines.spec import CostName
from pipelines.transport.plan import TransportPlan
from pipelines.transport.precision import in_full_precision, wide
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solvers import sinkhorn


@in_full_precision
def sinkhorn_divergence(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    epsilon: float,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    cost: CostName = "squared-euclidean",
    power: float = 2.0,
    tolerance: float = sinkhorn.TOLERANCE,
) -> torch.Tensor:
    """``OT(x, y) − OT(x, x) / 2 − OT(y, y) / 2`` for the entropic cost OT, differentiable in both sets of points.

    Feydy et al. (2019), "Interpolating between optimal transport and MMD using Sinkhorn divergences", eq. 3. Its value
    is that of the duals. By the envelope theorem (ibid., section 3.2) its gradient is that of ``<P, C(x, y)>`` with the
    plans held fixed: plans are solved without gradient, and gradients take memory for the points alone. Weights get
    none.

    Args:
        x: points of one side, (n, ...) float.
        y: points of the other side, (m, ...) float.
        epsilon: entropic regularisation, > 0.
        a: weights of x, (n,); uniform by default.
        b: weights of y, (m,); uniform by default.
        cost: name of the cost.
        power: exponent of the cost ``power``.
        tolerance: marginal error of the plans.

    Returns:
        A scalar of float32 or better. ≥ 0 up to the tolerance where ``exp(−cost / epsilon)`` is a positive definite
        kernel, as for the (squared) Euclidean costs.

    Raises:
        ProblemError: as of :meth:`TransportProblem.between`.
        NotConvergedError: as of :func:`pipelines.transport.solvers.sinkhorn.solve`.
    """
    terms = {"cost": cost, "power": power, "epsilon": epsilon}
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    x, y = wide(x).reshape(len(x), -1), wide(y).reshape(len(y), -1)
    for left, right, of_left, of_right, sign in ((x, y, a, b, 1.0), (x, x, a, a, -0.5), (y, y, b, b, -0.5)):
        problem = TransportProblem.between(left, right, a=of_left, b=of_right, **terms)  # type: ignore[arg-type]
        plan = sinkhorn.solve(problem, tolerance=tolerance)
        total = total + sign * _Value.apply(left, right, plan)  # type: ignore[no-untyped-call]
    return total.to(x.dtype)


class _Value(torch.autograd.Function):
    """The dual value of a plan, whose derivative is that of its cost."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, plan: TransportPlan) -> torch.Tensor:
        ctx.save_for_backward(x, y)
        ctx.plan = plan
        return torch.tensor(plan.certificate.dual, dtype=torch.float64, device=x.device)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, y = ctx.saved_tensors
        problem = ctx.plan.problem
        by_x, by_y = torch.zeros_like(x), torch.zeros_like(y)
        for start, block in ctx.plan.gibbs().blocks():
            inside = slice(start, start + len(block))
            part_x, part_y = _gradients(x[inside], y, block.to(x), problem.cost, problem.power)
            by_x[inside] = part_x
            by_y += part_y
        return by_x * upstream.to(x), by_y * upstream.to(y), None


@in_full_precision
def _gradients(
    x: torch.Tensor, y: torch.Tensor, block: torch.Tensor, cost: CostName, power: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of ``<P, C(x, y)>`` for some rows of P, by products of matrices."""
    if cost == "cosine":
        with torch.enable_grad():
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            unit_x, unit_y = (torch.nn.functional.normalize(side, dim=1) for side in (x, y))
            by_x, by_y = torch.autograd.grad(-(unit_x * (block @ unit_y)).sum(), (x, y))
        return by_x, by_y
    centre = y.mean(0)
    x, y = x - centre, y - centre
    if cost == "squared-euclidean":
        pull = 2 * block
    else:
        p = 1.0 if cost == "euclidean" else power
        squares = torch.addmm((x * x).sum(1)[:, None] + (y * y).sum(1), x, y.T, alpha=-2)
        # Pairs that coincide up to rounding have gradient 0.
        apart = squares > 1e-6 * squares.mean()
        pull = torch.where(apart, block * p * squares.clamp_min(torch.finfo(x.dtype).tiny).pow(p / 2 - 1), 0.0)
    by_x = x * pull.sum(1, keepdim=True) - pull @ y
    by_y = y * pull.sum(0)[:, None] - pull.T @ x
    return by_x, by_y
