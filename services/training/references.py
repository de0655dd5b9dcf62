"""Networks that a job uses without training them: the reference for evaluating generators, and feature maps of
objectives."""

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
    """Return the spec with the versions of registered networks, so that moved aliases do not affect a running job.

    Downloads the networks for the workers.

    Args:
        spec: spec of the job.
        uri: URI of the registry.
        models: folder of downloads that all workers can read.

    Raises:
        ModelNotFoundError: the model is not registered.
        ServiceError: the registry is unreachable.
        SourceError, SpecError: an ImageNet network is not available.
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
    """Return the reference for evaluating a generator; None if the spec names none.

    All ranks load it, so that an error stops all of them.

    Args:
        spec: spec from :func:`pinned`.
        uri: URI of the registry.
        models: folder for downloads.
        device: device of the network.
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
    """Return the networks by name whose features the objective compares; empty for most objectives.

    All ranks load them, so that an error stops all of them.

    Args:
        spec: spec from :func:`pinned`.
        uri: URI of the registry.
        models: folder for downloads.
        device: device of the networks.
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
