"""Couplings of noise and a whole data set, solved in advance and stored in a file of a few bytes per image.

The file stores a key per image, from which :func:`pipelines.randomness.normal_rows` draws the noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pipelines.data.arrays import write_atomically
from pipelines.errors import ProblemError, ShardError
from pipelines.objectives.conditions import ConditionCost
from pipelines.randomness import derived_seed, normal_rows
from pipelines.transport.planner import Planner
from pipelines.transport.problem import TransportProblem

_Result = TypeVar("_Result")

KIND = "monge coupling 1"
IN_FLIGHT = 2


@dataclass(frozen=True, eq=False)
class RecordedCoupling:
    """Noise of every image of a data set, in several rounds.

    Attributes:
        seeds: keys of the noise of each image in each round, (rounds, n) uint32.
        fingerprint: fingerprint of the data set.
        costs: mean cost of a pair in each round including the extra cost between classes, (rounds,) float64.
        max_gap: largest relative duality gap of the plans.
    """

    seeds: np.ndarray
    fingerprint: str
    costs: np.ndarray
    max_gap: float

    def write(self, path: Path) -> None:
        """Write a safetensors file, atomically."""
        told = {"kind": KIND, "fingerprint": self.fingerprint, "max_gap": repr(self.max_gap)}
        write_atomically(path, save({"seeds": self.seeds, "costs": self.costs}, metadata=told))

    @classmethod
    def read(cls, path: str | Path, fingerprint: str, images: int) -> RecordedCoupling:
        """Read the coupling of a data set.

        Args:
            path: path of the file.
            fingerprint: fingerprint of the data set.
            images: number of images in its training split.

        Raises:
            ShardError: the file cannot be read, or belongs to another data set.
        """
        hint = "solve it again with `monge couple`"
        try:
            with safe_open(path, framework="np") as file:
                told = file.metadata() or {}
                if told.get("kind") != KIND:
                    raise ValueError("it has no such metadata")
                coupling = cls(
                    file.get_tensor("seeds"), told["fingerprint"], file.get_tensor("costs"), float(told["max_gap"])
                )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ShardError(f"{path}: not a recorded coupling: {error}", hint=hint) from None
        shape = coupling.seeds.shape
        if coupling.fingerprint != fingerprint or len(shape) != 2 or shape[1] != images or not shape[0]:
            raise ShardError(f"{path}: couples another data set than this one of {images} images", hint=hint)
        return coupling


def record_coupling(
    planner: Planner,
    take: Callable[[np.ndarray], tuple[torch.Tensor, torch.Tensor]],
    images: int,
    fingerprint: str,
    *,
    rounds: int,
    pool: int,
    seed: int = 0,
    conditions: ConditionCost | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> RecordedCoupling:
    """Couple noise with a whole data set by exact plans over large pools.

    Each round shuffles the images into pools of nearly equal size, and assigns one noise vector of its pool to each
    image along the optimal plan.

    Args:
        planner: solver of the plans; several are requested at once.
        take: function from indices to images and labels, (k,) int64 → (k, d) float32, (k,) int64.
        images: number of images in the data set.
        fingerprint: fingerprint of the data set.
        rounds: number of couplings of the whole data set, each with different noise.
        pool: largest number of points on each side of a plan.
        seed: seed of shuffles and noise.
        conditions: extra cost between classes; see :class:`ConditionCost`.
        on_progress: function called with the number of images coupled and their total number.

    Raises:
        ProblemError: there are no images, rounds or points.
        TransportError: a plan could not be computed.
    """
    if min(images, rounds, pool) < 1:
        raise ProblemError(f"images, rounds and pool: at least 1 each expected, received {images}, {rounds}, {pool}")
    seeds = np.empty((rounds, images), dtype=np.uint32)
    costs = np.zeros(rounds)
    max_gap = 0.0

    def solve(index: int, number: int, places: np.ndarray) -> tuple[int, np.ndarray, np.ndarray, float, float]:
        # Keys have 32 bits, which is all that PyTorch's generator uses of a seed; they are distinct within a round.
        keys = ((derived_seed(seed, number, "recorded noise") + places) % 2**32).astype(np.uint32)
        real, labels = take(places)
        noise = normal_rows(keys, real.shape[1])
        if conditions is not None:
            real, noise = conditions.on(real, labels), conditions.on(noise, conditions.meant(labels, index))
        plan = planner.plan(TransportProblem.between(real, noise))
        if plan.assignment is None:
            raise ProblemError(f"round {number}: {plan.certificate.solver} gave no permutation")
        certificate = plan.certificate
        return number, places, keys[plan.assignment], certificate.primal, certificate.relative_gap

    done = 0
    with ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="couple") as threads:
        for number, places, keys, primal, gap in _in_flight(threads, solve, _pools(images, rounds, pool, seed)):
            seeds[number, places] = keys
            costs[number] += primal * len(places) / images
            max_gap = max(max_gap, gap)
            done += len(places)
            on_progress(done, rounds * images)
    return RecordedCoupling(seeds, fingerprint, costs, max_gap)


def _pools(images: int, rounds: int, pool: int, seed: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield for each pool its index, its round and the indices of its images."""
    index = itertools.count()
    for number in range(rounds):
        order = np.random.default_rng(derived_seed(seed, number, "pools")).permutation(images)
        for places in np.array_split(order, -(-images // pool)):
            yield next(index), number, places


def _in_flight(
    threads: ThreadPoolExecutor, call: Callable[..., _Result], tasks: Iterator[tuple[Any, ...]]
) -> Iterator[_Result]:
    """Yield results in the order of the tasks, with a few tasks running concurrently."""
    waiting: list[Future[_Result]] = []
    for task in tasks:
        waiting.append(threads.submit(call, *task))
        if len(waiting) > IN_FLIGHT:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()
