"""Construction of an objective from its spec."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pipelines.data.loader import ShardedDataset
from pipelines.data.patches import patch_count
from pipelines.errors import SpecError
from pipelines.models.autoencoder import AutoEncoder
from pipelines.models.critics import ConvCritic, Critic, ResidualCritic
from pipelines.models.flow import FlowUNet
from pipelines.models.network import Classifier, Encoder, Generator, Network
from pipelines.objectives.classification import Classification
from pipelines.objectives.conditions import ConditionCost
from pipelines.objectives.couplings import BatchPlan, Coupling, Independent, PoolPlan, Recorded
from pipelines.objectives.feature_transport import FeatureTransport
from pipelines.objectives.features import FeatureMap, RealPoints
from pipelines.objectives.flow import FlowMatching
from pipelines.objectives.gan import Gan
from pipelines.objectives.learned_transport import LearnedTransport
from pipelines.objectives.phase import Objective
from pipelines.objectives.reconstruction import Reconstruction
from pipelines.objectives.recorded import RecordedCoupling
from pipelines.objectives.regression import Regression
from pipelines.objectives.transport import TransportObjective
from pipelines.objectives.wasserstein import Wasserstein
from pipelines.shape import ImageShape
from pipelines.spec import (
    BatchPlanSpec,
    ClassificationSpec,
    CouplingSpec,
    CriticSpec,
    FlowSpec,
    GanSpec,
    IndependentSpec,
    JobSpec,
    LearnedTransportSpec,
    PoolPlanSpec,
    ReconstructionSpec,
    RecordedSpec,
    RegressionSpec,
    TransportSpec,
    WassersteinSpec,
)
from pipelines.transport.planner import Planner


def build_objective(
    spec: JobSpec,
    network: Classifier | Encoder | Generator,
    planner: Planner,
    data: ShardedDataset,
    networks: Mapping[str, Network] | None = None,
) -> Objective:
    """Build the objective that a spec describes, for a network that is already on its device.

    Args:
        spec: spec of the job.
        network: network that the job trains.
        planner: solver of transport plans, for objectives that need them.
        data: data set, for objectives that use more images than those of a batch.
        networks: networks of the features, by name.

    Raises:
        SpecError: the objective cannot train this kind of network, the data set does not have the classes of the spec,
            or the features are not valid for these images.
        ShardError: recorded couplings are missing, or belong to another data set.
    """
    match spec.objective, network:
        case ClassificationSpec(), Classifier():
            return Classification(spec.objective, network)
        case RegressionSpec(), Classifier():
            return Regression(spec.objective, network)
        case ReconstructionSpec(), AutoEncoder():
            _require_patches(spec.objective, data.image)
            return Reconstruction(spec.objective, network)
        case TransportSpec(features=[_, *_]), Generator():
            device = next(network.parameters()).device
            features = FeatureMap(
                spec.objective.features, networks or {}, data.train, data.image, device, spec.objective.components
            )
            return FeatureTransport(
                spec.objective, network, planner, features, RealPoints(features, data.train, device)
            )
        case TransportSpec(), Generator():
            return TransportObjective(spec.objective, network, planner, _weights(spec.objective, data))
        case GanSpec(), Generator():
            return Gan(spec.objective, network, _critic(spec.objective.critic, network))
        case WassersteinSpec(), Generator():
            return Wasserstein(spec.objective, network, _critic(spec.objective.critic, network))
        case LearnedTransportSpec(), Generator():
            critic = _critic(spec.objective.critic, network, spec.objective.features)
            return LearnedTransport(spec.objective, network, critic, planner)
        case FlowSpec(), FlowUNet():
            return FlowMatching(network, _coupling(spec.objective.coupling, spec, planner, data))
    raise SpecError(f"objective {spec.objective.kind!r} cannot train a {type(network).__name__}")


def _require_patches(spec: ReconstructionSpec, image: ImageShape) -> None:
    count = patch_count(image, spec.patch)
    hidden = round(spec.hidden * count)
    if hidden == count or (spec.hidden and not hidden):
        raise SpecError(
            f"objective.patch: {hidden} of the {count} patches of {spec.patch} pixels a side would be hidden",
            hint="use a smaller patch",
        )


def _critic(spec: CriticSpec, generator: Generator, features: int = 1) -> Critic:
    kind = ResidualCritic if spec.network == "residual" else ConvCritic
    critic = kind(generator.image, spec.width, features, spectral=spec.spectral, conditions=generator.conditions)
    return critic.to(next(generator.parameters()).device)


def _weights(spec: TransportSpec, data: ShardedDataset) -> torch.Tensor | None:
    """Weight of an image of each class."""
    if not spec.class_weights:
        return None
    strange = sorted(spec.class_weights.keys() - set(data.classes))
    if strange:
        raise SpecError(
            f"objective.class_weights: the data set has no class {strange[0]!r}",
            hint=f"choose among {', '.join(data.classes)}",
        )
    weights = torch.tensor([spec.class_weights.get(name, 1.0) for name in data.classes], dtype=torch.float64)
    if not bool(weights.any()):
        raise SpecError(
            "objective.class_weights: all classes weigh 0", hint="give at least one class a positive weight"
        )
    return weights


def _conditions(weight: float, spec: JobSpec, data: ShardedDataset) -> ConditionCost | None:
    return ConditionCost(len(data.classes), weight, spec.seed) if weight else None


def _coupling(coupling: CouplingSpec, spec: JobSpec, planner: Planner, data: ShardedDataset) -> Coupling:
    match coupling:
        case IndependentSpec():
            return Independent()
        case BatchPlanSpec():
            return BatchPlan(planner, _conditions(coupling.condition_weight, spec, data))
        case PoolPlanSpec():
            conditions = _conditions(coupling.condition_weight, spec, data)
            train = spec.train
            steps = -(-train.images // train.batch)
            return PoolPlan(planner, data.train, coupling.points, train.batch, spec.seed, steps, conditions)
        case RecordedSpec():
            fingerprint = data.manifest.fingerprint
            return Recorded(RecordedCoupling.read(coupling.file, fingerprint, len(data.train)))
