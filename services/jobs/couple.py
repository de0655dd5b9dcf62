"""Couplings of a whole data set, solved by the transport service before any job reads them."""

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
    """Couple noise with the training images of a data set, sharding it first if need be.

    Args:
        spec: the data set.
        settings: where everything is.
        rounds: couplings of the whole data set, each with noise of its own.
        pool: most points on each side of a plan.
        seed: of shuffles and noise.
        condition_weight: what a plan pays for noise meant for one class and an image of another; 0 for plans that
            do not know of classes.
        shards, pairs: called with what is done and what there is in all.

    Raises:
        MongeError: of the data, or of the service.
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
