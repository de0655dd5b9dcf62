"""Laws that relate exact problems: split and merged masses, shifted and scaled costs, partial plans."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from solving import all_plans

from pipelines.transport.problem import TransportProblem

settings.register_profile("ties", settings.get_profile("laws"), max_examples=30)
TIES = settings.get_profile("ties")

# Lattices are where costs tie and points coincide. Two plans of unlike cost there differ by twelfths, far above what
# float32 leaves of a square, and of its root.
OF_SQUARES, OF_ROOTS = 1e-4, 1e-2


@st.composite
def lattice(draw: st.DrawFn, largest: int, d: int = 2) -> np.ndarray:
    """Draw points with small integer coordinates, (n, d)."""
    size = draw(st.integers(1, largest))
    coordinates = st.lists(st.integers(-2, 2), min_size=size * d, max_size=size * d)
    return np.array(draw(coordinates), dtype=np.float32).reshape(size, d)


@st.composite
def counts(draw: st.DrawFn, size: int, total: int) -> np.ndarray:
    """Draw integer masses, at least 1 each, with a given sum."""
    cuts = draw(st.lists(st.integers(1, total - 1), min_size=size - 1, max_size=size - 1, unique=True))
    return np.diff([0, *sorted(cuts), total])


def primals(problem: TransportProblem) -> dict[str, float]:
    return {name: plan.certificate.primal for name, plan in all_plans(problem).items()}


def assert_same(first: dict[str, float], second: dict[str, float], rounding: float = OF_SQUARES) -> None:
    """Check that all values of both problems are equal, for all solvers."""
    found = [*first.values(), *second.values()]
    assert max(found) - min(found) <= rounding, (first, second)


@TIES
@given(x=lattice(5), y=lattice(5), data=st.data())
def test_a_point_split_in_two_moves_as_it_did(x: np.ndarray, y: np.ndarray, data: st.DataObject) -> None:
    """The distribution of mass between two copies of a point does not affect the cost."""
    a, b = data.draw(counts(len(x), 12), label="a"), data.draw(counts(len(y), 12), label="b")
    place, share = data.draw(st.integers(0, len(x) - 1), label="place"), data.draw(st.floats(0, 1), label="share")
    split = np.append(a.astype(np.float64), a[place] * share)
    split[place] -= split[-1]
    twice = np.concatenate([x, x[place : place + 1]])
    before = TransportProblem.between(x, y, a=a, b=b)
    after = TransportProblem.between(twice, y, a=split, b=b)
    assert_same(primals(before), primals(after))


@TIES
@given(x=lattice(4), y=lattice(4), data=st.data())
def test_whole_masses_are_as_many_points(x: np.ndarray, y: np.ndarray, data: st.DataObject) -> None:
    """A weighted plan is a permutation of repeated points: Kantorovich's problem in the form of Monge's."""
    a, b = data.draw(counts(len(x), 6), label="a"), data.draw(counts(len(y), 6), label="b")
    weighted = TransportProblem.between(x, y, a=a, b=b)
    repeated = TransportProblem.between(x.repeat(a, axis=0), y.repeat(b, axis=0))
    assert repeated.is_assignment
    assert_same(primals(weighted), primals(repeated))


@TIES
@given(x=lattice(8), shift=lattice(1))
def test_moving_a_row_by_one_step_is_moving_its_first_point_to_its_end(x: np.ndarray, shift: np.ndarray) -> None:
    """For a distance, unlike its square, mass common to both sides may stay, and many plans are optimal."""
    chain = x[:1] + np.arange(len(x) + 1, dtype=np.float32)[:, None] * shift
    problem = TransportProblem.between(chain[:-1], chain[1:], cost="euclidean")
    ends = TransportProblem.between(chain[:1], chain[-1:], cost="euclidean")
    found = primals(problem)
    whole = {name: primal / len(x) for name, primal in primals(ends).items()}
    assert_same(found, whole, OF_ROOTS)


@TIES
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 6), m=st.integers(1, 6), data=st.data())
def test_costs_of_leaving_and_of_arriving_are_paid_by_every_plan(
    seed: int, n: int, m: int, data: st.DataObject
) -> None:
    """C + u ⊕ v costs a·u + b·v more, and s C costs s times as much; the same plans are optimal (section 2.5)."""
    random = np.random.default_rng(seed)
    # Eighths, so that float32 holds every sum of them.
    costs, u, v = (random.integers(-16, 17, shape) / 8 for shape in ((n, m), (n, 1), (1, m)))
    a, b = data.draw(counts(n, 12), label="a") / 12, data.draw(counts(m, 12), label="b") / 12
    scale = data.draw(st.sampled_from([0.0, 0.125, 1.0, 8.0]), label="scale")
    moved = scale * costs + u + v
    before = all_plans(TransportProblem.from_cost(costs, a=a, b=b))
    after = all_plans(TransportProblem.from_cost(moved, a=a, b=b))
    fees = float(a @ u[:, 0] + b @ v[0])
    expected = {name: scale * plan.certificate.primal + fees for name, plan in before.items()}
    assert_same(expected, {name: plan.certificate.primal for name, plan in after.items()}, 1e-6)
    for name, plan in before.items():
        assert abs((plan.dense() * moved).sum() - expected[name]) <= 1e-6, name


@TIES
@given(seed=st.integers(0, 2**32 - 1), x=lattice(7, d=3), data=st.data())
def test_an_optimal_plan_is_cyclically_monotone(seed: int, x: np.ndarray, data: st.DataObject) -> None:
    """No two and no three of its pairs gain by exchanging their targets (Villani 2009, theorem 5.10)."""
    random = np.random.default_rng(seed)
    y = random.normal(size=(data.draw(st.integers(1, 7), label="m"), 3)).astype(np.float32)
    costs = ((x[:, None].astype(np.float64) - y[None]) ** 2).sum(2)
    for name, plan in all_plans(TransportProblem.between(x, y)).items():
        rows, columns, _ = plan.entries()
        for pairs in (*itertools.permutations(range(len(rows)), 2), *itertools.permutations(range(len(rows)), 3)):
            chosen = list(pairs)
            turned = chosen[1:] + chosen[:1]
            kept, exchanged = costs[rows[chosen], columns[chosen]], costs[rows[chosen], columns[turned]]
            assert kept.sum() <= exchanged.sum() + OF_SQUARES, name


@TIES
@given(x=lattice(5), y=lattice(5), z=lattice(5), data=st.data())
def test_mixing_targets_costs_no_more_than_mixing_plans(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, data: st.DataObject
) -> None:
    """The distance is convex in each marginal: a mixture of plans is a plan of the mixture."""
    share = data.draw(st.sampled_from([0.25, 0.5, 0.75]), label="share")
    to_y, to_z = primals(TransportProblem.between(x, y)), primals(TransportProblem.between(x, z))
    mixture = np.concatenate([np.full(len(y), share / len(y)), np.full(len(z), (1 - share) / len(z))])
    mixed = primals(TransportProblem.between(x, np.concatenate([y, z]), b=mixture))
    bound = share * max(to_y.values()) + (1 - share) * max(to_z.values())
    assert max(mixed.values()) <= bound + OF_SQUARES
