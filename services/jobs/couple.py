"""Couplings of a whole data set, solved by the transport service before jobs use them."""

from __future__ import annotations

import numpy as np
import ray
import torch

from pipelines.models.bundle import to_float
from pipelines.objectives.conditions import ConditionCost
from pipelines.objectives.recorded import RecordedCoupling, record_coupling
from pipelines.spec import DataSpec
from services.cluster import join_cluster
from services.settings import Settings
from services.sharding.dataset import dataset_address, shard_dataset
from services.storage.datasets import open_data
from services.terminal import OnProgress
from services.transport.client import RayPlanner


def couple(
    spec: DataSpec,
    settings: Settings,
    rounds: int,
    pool: int,
    seed: int,
    condition_weight: float,
    shards: OnProgress,
    pairs: OnProgress,
) -> RecordedCoupling:
    """Couple noise with the training images of a data set, after sharding it if necessary.

    Args:
        spec: data section of a job spec.
        settings: addresses of the services.
        rounds: number of couplings of the whole data set, each with different noise.
        pool: maximum number of points on each side of a plan.
        seed: seed of shuffles and noise.
        condition_weight: cost added to pairs of noise for one class and an image of another; 0 ignores classes.
        shards, pairs: called with the work done and the total work.

    Raises:
        MongeError: the data is invalid, or the service fails.
    """
    join_cluster(settings)
    try:
        address = dataset_address(settings.home, spec, settings.storage)
        shard_dataset(spec, address, settings.home / "cache", on_progress=shards)
        data = open_data(address, settings).limited(spec.per_class)

        def take(places: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            images, labels = data.train.take(places)
            return to_float(images).flatten(1), labels

        return record_coupling(
            RayPlanner("couple", deadline=settings.plan_deadline),
            take,
            len(data.train),
            data.manifest.fingerprint,
            rounds=rounds,
            pool=pool,
            seed=seed,
            conditions=ConditionCost(len(data.classes), condition_weight, seed) if condition_weight else None,
            on_progress=pairs,
        )
    finally:
        ray.shutdown()
