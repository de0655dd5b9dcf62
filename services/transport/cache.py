"""Cache of plans for repeated problems, by content."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterator

import numpy as np

from pipelines.transport.plan import TransportPlan
from pipelines.transport.problem import TransportProblem

SAMPLE = 1024
"""Number of values of each array in a sketch."""


def arrays(problem: TransportProblem) -> Iterator[np.ndarray | None]:
    """Yield the arrays of a problem; they share memory with it."""
    for part in (problem.x, problem.y, problem.matrix, problem.a, problem.b):
        yield None if part is None else np.asarray(part)


def terms(problem: TransportProblem) -> tuple[object, ...]:
    """Return the parameters of a problem other than its arrays."""
    return problem.cost, problem.power, problem.epsilon, problem.marginal_penalty


def size_of(problem: TransportProblem) -> int:
    """Return the size of a problem's arrays in bytes."""
    return sum(part.nbytes for part in arrays(problem) if part is not None)


def sketch(problem: TransportProblem, solver: str) -> bytes:
    """Return a hash over a sample of the content: equal for equal problems, different for almost all others.

    Hashing 25 MB of points takes a tenth of the time of solving for them. A sketch takes microseconds and shows that a
    problem is new, as almost all are; only problems that may be repeated are hashed completely.
    """
    digest = _header(problem, solver)
    for part in arrays(problem):
        if part is not None:
            digest.update(np.ascontiguousarray(part.reshape(-1)[:: max(1, part.size // SAMPLE)]).data)
    return digest.digest()


def problem_digest(problem: TransportProblem, solver: str) -> bytes:
    """Return the SHA-256 of the whole content of a problem and the name of the solver."""
    digest = _header(problem, solver)
    for part in arrays(problem):
        if part is not None:
            digest.update(np.ascontiguousarray(part).data)
    return digest.digest()


def same(one: TransportProblem, other: TransportProblem) -> bool:
    """Return whether two problems are numerically equal."""
    if terms(one) != terms(other):
        return False
    pairs = zip(arrays(one), arrays(other), strict=True)
    return all(a is b if a is None or b is None else np.array_equal(a, b) for a, b in pairs)


def _header(problem: TransportProblem, solver: str) -> hashlib._Hash:
    shapes = [None if part is None else (part.shape, part.dtype.str) for part in arrays(problem)]
    return hashlib.sha256(repr((*terms(problem), solver, shapes)).encode())


class PlanCache:
    """Cache of the most recently used plans, limited in bytes.

    Args:
        capacity: maximum size of all plans in bytes; 0 disables the cache.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.bytes = 0
        self._plans: OrderedDict[tuple[bytes, bytes], tuple[TransportPlan, int]] = OrderedDict()
        self._sketches: Counter[bytes] = Counter()

    def may_hold(self, sketched: bytes) -> bool:
        """Return whether the cache may hold a plan for a problem with this sketch."""
        return sketched in self._sketches

    def get(self, sketched: bytes, printed: bytes) -> TransportPlan | None:
        """Return the plan of a problem, or None; a plan that is found counts as used."""
        found = self._plans.get((sketched, printed))
        if found is None:
            return None
        self._plans.move_to_end((sketched, printed))
        return found[0]

    def put(self, sketched: bytes, printed: bytes, plan: TransportPlan) -> None:
        """Store a plan, and evict the least recently used plans until all fit."""
        parts = (plan.assignment, plan.rows, plan.columns, plan.mass, plan.f, plan.g)
        size = sum(part.nbytes for part in parts if part is not None)
        if size > self.capacity or (sketched, printed) in self._plans:
            return
        self._plans[sketched, printed] = (plan, size)
        self._sketches[sketched] += 1
        self.bytes += size
        while self.bytes > self.capacity:
            (oldest, _), (_, freed) = self._plans.popitem(last=False)
            self.bytes -= freed
            self._sketches[oldest] -= 1
            if not self._sketches[oldest]:
                del self._sketches[oldest]
