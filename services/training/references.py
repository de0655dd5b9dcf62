"""Networks that a job uses and does not train, found once for all its workers: what judges its generator, and those in
whose features its objective compares images."""

from __future__ import annotations

from pathlib import Path

import torch

from pipelines.evaluation.features import ClassifierFeatures, FeatureExtractor
from pipelines.evaluation.imagenet import imagenet_features
from pipelines.models.network import Network
from pipelines.spec import JobSpec, TransportSpec
from pipelines.spec.training import imagenet
from services.tracking.registry import download, resolve


def pinned(spec: JobSpec, uri: str, models: Path) -> JobSpec:
    """The spec with registered networks by their versions, whatever their aliases do while the job runs.

    The networks are downloaded, so that the workers find them.

    Args:
        spec: of the job.
        uri: of the registry.
        models: folder of downloads, which every worker can read.

    Raises:
        ModelNotFoundError: there is no such model.
        ServiceError: the registry cannot be reached.
        SourceError, SpecError: an ImageNet network cannot be had.
    """

    def version(name: str) -> str:
        reference = resolve(uri, name)
        download(uri, reference, models)
        return reference.by_version

    spec = spec.with_versions(version)
    if spec.evaluation.registered is None:
        reference_of(spec, uri, models, torch.device("cpu"))
    for name in _networks(spec):
        if (known := imagenet(name)) is not None:
            imagenet_features(known, None, models, torch.device("cpu"))
    return spec


def reference_of(spec: JobSpec, uri: str, models: str | Path, device: torch.device) -> FeatureExtractor | None:
    """What judges a job's generator, None where its spec names nothing.

    Every rank loads it, so that what is wrong with it ends all of them.

    Args:
        spec: of the job, :func:`pinned`.
        uri: of the registry.
        models: folder of downloads.
        device: where its network is to be.
    """
    if (name := spec.evaluation.imagenet) is not None:
        return imagenet_features(name, spec.evaluation.weights, Path(models), device)
    if (registered := spec.evaluation.registered) is None:
        return None
    ref = resolve(uri, registered)
    bundle = download(uri, ref, models)
    bundle.network.to(device)
    return ClassifierFeatures(ref.by_version, bundle)


def feature_networks(spec: JobSpec, uri: str, models: str | Path, device: torch.device) -> dict[str, Network]:
    """By name, the networks in whose features a job's objective compares images; none for most objectives.

    Every rank loads them, so that what is wrong with one ends all of them.

    Args:
        spec: of the job, :func:`pinned`.
        uri: of the registry.
        models: folder of downloads.
        device: where the networks are to be.
    """
    found: dict[str, Network] = {}
    for name in _networks(spec):
        if (known := imagenet(name)) is not None:
            found[name] = imagenet_features(known, None, Path(models), device).network
        else:
            found[name] = download(uri, resolve(uri, name), Path(models)).network.to(device)
    return found


def _networks(spec: JobSpec) -> tuple[str, ...]:
    return spec.objective.networks if isinstance(spec.objective, TransportSpec) else ()
