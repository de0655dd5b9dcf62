"""What judges a job's generator, found once for all its workers: a registered classifier, or an ImageNet network."""

from __future__ import annotations

from pathlib import Path

import torch

from pipelines.evaluation.features import ClassifierFeatures, FeatureExtractor
from pipelines.evaluation.imagenet import imagenet_features
from pipelines.spec import JobSpec
from services.tracking.registry import download, resolve


def pinned(spec: JobSpec, uri: str, models: Path) -> JobSpec:
    """The spec with a registered reference by its version, whatever its alias does while the job runs.

    What judges is downloaded, so that the workers find it.

    Args:
        spec: of the job.
        uri: of the registry.
        models: folder of downloads, which every worker can read.

    Raises:
        ModelNotFoundError: there is no such classifier.
        ServiceError: the registry cannot be reached.
        SourceError, SpecError: an ImageNet network cannot be had.
    """
    name = spec.evaluation.registered
    if name is None:
        reference_of(spec, uri, models, torch.device("cpu"))
        return spec
    reference = resolve(uri, name)
    download(uri, reference, models)
    evaluation = spec.evaluation.model_copy(update={"reference": f"{reference.name}/{reference.version}"})
    return spec.model_copy(update={"evaluation": evaluation})


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
    return ClassifierFeatures(f"{ref.name}/{ref.version}", bundle)
