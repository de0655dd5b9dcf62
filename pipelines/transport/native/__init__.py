"""The assignment solver in C++, called without the interpreter's lock.

It is built when the package is installed, once for each instruction set, where there is a compiler; everything works
without it. The environment variable ``MONGE_SIMD`` forces an instruction set (``baseline``, ``avx2``, ``avx512``), or
none (``off``).
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipelines.transport.native.library import (
    LEVELS,
    Implementation,
    Request,
    has_bfloat16,
    implementation,
    loaded,
    native_available,
    native_level,
    usable_levels,
)
from pipelines.transport.rounding import gamma, of_differences

__all__ = [
    "LEVELS",
    "Implementation",
    "Points",
    "Prepared",
    "Screen",
    "Solution",
    "Table",
    "assign",
    "distances",
    "has_bfloat16",
    "implementation",
    "native_available",
    "native_level",
    "prepare",
    "summarise",
    "usable_levels",
]

_KINDS = {"costs": 0, "products": 1, "bfloat16-products": 2}
_STATUS = ("solved", "too coarse", "out of budget", "out of memory", "stopped")

INTERRUPTIBLE = 2048
"""Points from which a solve is long enough to wait for it where Ctrl-C is heard."""


@dataclass(frozen=True, eq=False)
class Screen:
    """An (n, n) matrix that is near the costs, up to constants of the row and of the column.

    Attributes:
        kind: ``costs`` (float32, lower bounds), ``products`` (float32 inner products) or ``bfloat16-products`` (the
            same as uint16 bits).
        matrix: (n, n), contiguous.
        error: (n,) float64, how far the screen may lie above the exact entries of each row, the rounding of the
            products to bfloat16 apart; None for not at all.
        strict: whether to give up when the error passes the distance between candidates.
    """

    kind: str
    matrix: np.ndarray
    error: np.ndarray | None = None
    strict: bool = False


@dataclass(frozen=True, eq=False)
class PointCosts:
    """Where the exact entries come from: ``scale · ‖xᵢ − yⱼ‖² − rowᵢ − columnⱼ``, or ``scale · ‖xᵢ − yⱼ‖``.

    Attributes:
        x, y: (n, d) float32 or both float64, contiguous.
        scale: a factor of the cost, a power of two.
        root: whether the cost is the distance and not its square.
        row, column: (n,) float64 constants, None for zeros.
    """

    x: np.ndarray
    y: np.ndarray
    scale: float
    root: bool = False
    row: np.ndarray | None = None
    column: np.ndarray | None = None

    @property
    def rounding(self) -> float:
        """Relative error of ``scale · ‖xᵢ − yⱼ‖²`` as computed."""
        return of_differences(self.x.shape[1]) + gamma(4)


@dataclass(frozen=True, eq=False)
class Table:
    """Exact entries ``scale · cost − rowᵢ − columnⱼ`` of a float64 matrix.

    Attributes:
        cost: (n, n) float64, contiguous.
        scale: a power of two.
        row, column: (n,) float64.
    """

    cost: np.ndarray
    scale: float
    row: np.ndarray
    column: np.ndarray
    root: bool = False
    rounding: float = 0.0


@dataclass(frozen=True, eq=False)
class ExactSolution:
    """What the solver returns.

    Attributes:
        status: ``solved``, or why not: ``too coarse``, ``out of budget`` or ``stopped``.
        assignment: (n,) int64.
        f, g: (n,) float64, ``f_i + g_j ≤`` the true entry for every i and j, up to the rounding of that sum.
        matched: (n,) float64, the cost of each pair of the assignment in the solver's units, constants included.
        readings, bids, pops: rows of the screen read in full; bids of augmenting row reduction; columns scanned by
            Dijkstra's method.
        looks: entries of candidate lists that it looked at.
    """

    status: str
    assignment: np.ndarray
    f: np.ndarray
    g: np.ndarray
    matched: np.ndarray
    readings: int
    bids: int
    pops: int
    looks: int


def _pointer(array: np.ndarray | None, dtype: type | str, shape: tuple[int, ...]) -> int | None:
    if array is None:
        return None
    assert array.dtype == dtype
    assert array.shape == shape
    assert array.flags.c_contiguous
    return array.ctypes.data


def assign(
    screen: Screen,
    points: PointCosts | Table | None = None,
    start: np.ndarray | None = None,
    budget: int = 2**62,
    looks: int = 2**62,
) -> ExactSolution:
    """An optimal assignment. Any number of threads may call it at once; it runs without the interpreter's lock.

    Args:
        screen: what is read in full.
        points: what decides; None when the screen holds the exact costs.
        start: (n,) float32 column potentials to start from.
        budget: rows that may be read in full before the solver gives up.
        looks: entries of candidate lists that shortest paths may look at before it gives up.

    Raises:
        TransportError: the solver is not available.
        MemoryError: candidate lists did not fit.
    """
    n = len(screen.matrix)
    f, g, matched = np.empty((3, n))
    assignment, counts = np.empty(n, np.int64), np.zeros(6, np.int64)
    d = points.x.shape[1] if isinstance(points, PointCosts) else 0
    sides: dict[str, int | None] = {"x": None, "y": None, "x_wide": None, "y_wide": None, "table": None}
    if isinstance(points, PointCosts):
        kind, suffix = (np.float64, "_wide") if points.x.dtype == np.float64 else (np.float32, "")
        sides |= {f"{side}{suffix}": _pointer(getattr(points, side), kind, (n, d)) for side in "xy"}
    elif points:
        sides["table"] = _pointer(points.cost, np.float64, (n, n))
    stored = np.uint16 if screen.kind == "bfloat16-products" else np.float32
    stop = ctypes.c_int32(0)
    request = Request(
        n=n,
        d=d,
        kind=_KINDS[screen.kind],
        root=points.root if points else False,
        strict=screen.strict,
        stop=ctypes.addressof(stop),
        screen=_pointer(screen.matrix, stored, (n, n)),
        error=_pointer(screen.error, np.float64, (n,)),
        **sides,
        rounding=points.rounding if points else 0.0,
        scale=points.scale if points else 1.0,
        row=_pointer(points.row, np.float64, (n,)) if points else None,
        column=_pointer(points.column, np.float64, (n,)) if points else None,
        start=_pointer(start, np.float32, (n,)),
        budget=budget,
        looks=looks,
        f=f.ctypes.data,
        g=g.ctypes.data,
        matched=matched.ctypes.data,
        assignment=assignment.ctypes.data,
        counts=counts.ctypes.data,
    )
    library = loaded()
    status = _STATUS[_interruptible(lambda: library.monge_assign(ctypes.byref(request)), stop, n)]
    if status == "out of memory":
        raise MemoryError(f"candidate lists of an assignment of {n} points")
    readings, bids, _, pops, _, looks = counts.tolist()
    return ExactSolution(status, assignment, f, g, matched, readings, bids, pops, looks)


def _interruptible(call: Callable[[], int], stop: ctypes.c_int32, n: int) -> int:
    """The result of a long call, which is told to stop when its caller is interrupted.

    Signals are only heard by the main thread, and there only between instructions of the interpreter: it waits while
    another thread is in C++.
    """
    if n < INTERRUPTIBLE or threading.current_thread() is not threading.main_thread():
        return call()
    results: list[int] = []
    done = threading.Event()

    def work() -> None:
        try:
            results.append(call())
        finally:
            done.set()

    worker = threading.Thread(target=work, name="exact-assignment")
    try:
        worker.start()
        done.wait()
    except BaseException:
        stop.value = 1
        # Its arrays must outlive the call, however impatient the user is: it ends within milliseconds.
        while worker in threading.enumerate() and not done.is_set():
            with contextlib.suppress(KeyboardInterrupt):
                done.wait()
        raise
    return results[0]


def summarise(x: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean of float32 points, (d,) float64, and their largest coordinate in absolute value."""
    n, d = x.shape
    mean = np.empty(d)
    return mean, loaded().monge_summarise(_pointer(x, np.float32, (n, d)), n, d, mean.ctypes.data)


@dataclass(frozen=True, eq=False)
class PreparedPoints:
    """Points ready for a matrix product.

    Attributes:
        stored: (n, d), float32, or bfloat16 as uint16 bits: ``scale · (x − mean)``, rounded.
        norm: (n,) float64, lengths before rounding.
        residual: (n,) float64, lengths of what rounding changed.
        constant: (n,) float64, ``½ scale² ‖x − other‖²``.
    """

    stored: np.ndarray
    norm: np.ndarray
    residual: np.ndarray
    constant: np.ndarray


def prepare(x: np.ndarray, mean: np.ndarray, other: np.ndarray, scale: float, *, bfloat16: bool) -> PreparedPoints:
    """Centre, scale and round points, with the size of the rounding.

    Args:
        x: (n, d) float32 or float64.
        mean: (d,) float64, theirs.
        other: (d,) float64, the mean of the points on the other side.
        scale: a factor.
        bfloat16: whether to round to bfloat16.
    """
    n, d = x.shape
    stored = np.empty((n, d), np.uint16 if bfloat16 else np.float32)
    norm, residual, constant = np.empty(n), np.empty(n), np.empty(n)
    wide = x.dtype == np.float64
    (loaded().monge_prepare_wide if wide else loaded().monge_prepare)(
        _pointer(x, np.float64 if wide else np.float32, (n, d)),
        n,
        d,
        *(_pointer(centre, np.float64, (d,)) for centre in (mean, other)),
        scale,
        bfloat16,
        *(out.ctypes.data for out in (stored, norm, residual, constant)),
    )
    return PreparedPoints(stored, norm, residual, constant)


def distances(x: np.ndarray, y: np.ndarray, factor: float, *, root: bool) -> np.ndarray:
    """``factor · ‖xᵢ − yⱼ‖²`` (or ``‖xᵢ − yⱼ‖``) from the differences of coordinates, (n, n) float32.

    Its error is relative to each distance: about d / 2 + 2 units of float32's last place at most.
    """
    n, d = x.shape
    matrix = np.empty((n, n), np.float32)
    transposed = np.ascontiguousarray(y.T)
    wide = x.dtype == np.float64
    (loaded().monge_distances_wide if wide else loaded().monge_distances)(
        _pointer(x, np.float64 if wide else np.float32, (n, d)),
        transposed.ctypes.data,
        n,
        d,
        factor,
        root,
        matrix.ctypes.data,
    )
    return matrix
