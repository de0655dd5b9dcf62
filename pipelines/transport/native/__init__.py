"""The assignment solver in C++, called without the GIL.

It is built at installation, once for each instruction set, if a compiler is available. It is optional. The environment
variable ``MONGE_SIMD`` forces an instruction set (``baseline``, ``avx2``, ``avx512``), or disables the solver
(``off``).
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
"""Number of points from which a solve runs in a separate thread, so that Ctrl-C can interrupt it."""


@dataclass(frozen=True, eq=False)
class Screen:
    """An (n, n) matrix that approximates the costs, up to constants per row and per column.

    Attributes:
        kind: ``costs`` (float32, lower bounds), ``products`` (float32 inner products) or ``bfloat16-products``
            (bfloat16 inner products as uint16 bits).
        matrix: screen entries, (n, n), contiguous.
        error: maximum amount by which the screen exceeds the exact entries of each row, without the rounding of the
            products to bfloat16, (n,) float64; None if it never does.
        strict: whether to stop if the error exceeds the distance between candidates.
    """

    kind: str
    matrix: np.ndarray
    error: np.ndarray | None = None
    strict: bool = False


@dataclass(frozen=True, eq=False)
class PointCosts:
    """Exact entries from points: ``scale · ‖xᵢ − yⱼ‖² − rowᵢ − columnⱼ``, or ``scale · ‖xᵢ − yⱼ‖``.

    Attributes:
        x, y: points, (n, d), both float32 or both float64, contiguous.
        scale: factor of the cost, a power of two.
        root: whether the cost is the distance instead of its square.
        row, column: constants, (n,) float64; None for zeros.
    """

    x: np.ndarray
    y: np.ndarray
    scale: float
    root: bool = False
    row: np.ndarray | None = None
    column: np.ndarray | None = None

    @property
    def rounding(self) -> float:
        """Relative error of the computed ``scale · ‖xᵢ − yⱼ‖²``."""
        return of_differences(self.x.shape[1]) + gamma(4)


@dataclass(frozen=True, eq=False)
class Table:
    """Exact entries from a float64 matrix: ``scale · cost − rowᵢ − columnⱼ``.

    Attributes:
        cost: cost matrix, (n, n) float64, contiguous.
        scale: factor of the cost, a power of two.
        row, column: constants, (n,) float64.
    """

    cost: np.ndarray
    scale: float
    row: np.ndarray
    column: np.ndarray
    root: bool = False
    rounding: float = 0.0


@dataclass(frozen=True, eq=False)
class ExactSolution:
    """Result of the solver.

    Attributes:
        status: ``solved``, or the reason for stopping: ``too coarse``, ``out of budget`` or ``stopped``.
        assignment: target of each source, (n,) int64.
        f, g: potentials, (n,) float64; ``f_i + g_j ≤`` the true entry for all i and j, up to the rounding of that sum.
        matched: cost of each pair of the assignment in the solver's units, constants included, (n,) float64.
        readings, bids, pops: number of screen rows read in full; of bids of augmenting row reduction; of columns
            scanned by Dijkstra's method.
        looks: number of entries read from candidate lists.
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
    """Compute an optimal assignment. Thread-safe; runs without the GIL.

    Args:
        screen: approximate costs, read row by row.
        points: source of the exact entries; None if the screen has the exact costs.
        start: initial column potentials, (n,) float32.
        budget: maximum number of full row reads before the solver stops.
        looks: maximum number of candidate list entries that shortest paths read before the solver stops.

    Raises:
        TransportError: if the solver is not available.
        MemoryError: if the candidate lists do not fit into memory.
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
    """Run a long call in a thread, and stop it if the caller is interrupted.

    Python handles signals only in the main thread, between bytecode instructions. The main thread therefore waits in
    Python while another thread runs the C++ code.
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
        # The arrays must outlive the call, even on repeated interrupts; it ends within milliseconds.
        while worker in threading.enumerate() and not done.is_set():
            with contextlib.suppress(KeyboardInterrupt):
                done.wait()
        raise
    return results[0]


def summarise(x: np.ndarray) -> tuple[np.ndarray, float]:
    """Compute the mean of float32 points, (d,) float64, and their largest absolute coordinate."""
    n, d = x.shape
    mean = np.empty(d)
    return mean, loaded().monge_summarise(_pointer(x, np.float32, (n, d)), n, d, mean.ctypes.data)


@dataclass(frozen=True, eq=False)
class PreparedPoints:
    """Points ready for a matrix product.

    Attributes:
        stored: rounded ``scale · (x − mean)``, (n, d), float32 or bfloat16 as uint16 bits.
        norm: norms before rounding, (n,) float64.
        residual: norms of the rounding errors, (n,) float64.
        constant: ``½ scale² ‖x − other‖²``, (n,) float64.
    """

    stored: np.ndarray
    norm: np.ndarray
    residual: np.ndarray
    constant: np.ndarray


def prepare(x: np.ndarray, mean: np.ndarray, other: np.ndarray, scale: float, *, bfloat16: bool) -> PreparedPoints:
    """Centre, scale and round points, and compute the size of the rounding error.

    Args:
        x: points, (n, d) float32 or float64.
        mean: mean of the points, (d,) float64.
        other: mean of the points on the other side, (d,) float64.
        scale: factor of the coordinates.
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
    """Compute ``factor · ‖xᵢ − yⱼ‖²`` (or ``‖xᵢ − yⱼ‖``) from differences of coordinates, (n, n) float32.

    The error is relative to each distance: at most about d / 2 + 2 units in float32's last place.
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
