"""Section ``objective`` of the spec: one class per objective."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipelines.spec.models import CriticSpec
from pipelines.spec.section import ModelReference, Section
from pipelines.spec.training import imagenet

CostName = Literal["squared-euclidean", "euclidean", "power", "cosine"]


class ClassificationSpec(Section):
    """Least squares or cross-entropy between predicted probabilities and labels."""

    kind: Literal["classification"]
    loss: Literal["cross-entropy", "least-squares"] = Field(default="cross-entropy", description="loss function")
    flip: bool = Field(default=False, description="mirror each training image left to right with probability 1/2")
    shift: int = Field(default=0, ge=0, le=64, description="largest random shift of training images, in pixels")
    cutout: int = Field(
        default=0, ge=0, le=256, description="side of a random square that is masked in training images, in pixels"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="fraction of each label that is spread evenly over all classes"
    )
    mixup: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="α: mix each image with another one of the batch, with a weight drawn from Beta(α, α); 0: off",
    )
    cutmix: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="α: paste a rectangle of another image of the batch, with an area drawn from Beta(α, α); 0: off",
    )

    @property
    def mixes(self) -> bool:
        """Whether each training image is mixed with another one of its batch."""
        return self.mixup > 0 or self.cutmix > 0

    @model_validator(mode="after")
    def _mix_in_one_way(self) -> ClassificationSpec:
        if self.mixup and self.cutmix:
            raise ValueError(f"mixup {self.mixup} and cutmix {self.cutmix} exclude each other; set one of them to 0")
        return self


class RegressionSpec(Section):
    """Least squares between the single output of a network and a continuous function of the image."""

    kind: Literal["regression"]
    target: Literal["waves", "cone"] = Field(
        default="waves",
        description="function of the mean brightness u, v in [−1, 1] of the left and right half of an image; waves: "
        "sin(πu) sin(πv); cone: √(u² + v²)",
    )


class ReconstructionSpec(Section):
    """Reconstruction of images from images with hidden patches by an auto-encoder; labels are not used."""

    kind: Literal["reconstruction"]
    hidden: float = Field(default=0.5, ge=0, lt=1, description="fraction of the patches that are hidden")
    patch: int = Field(default=4, ge=1, le=256, description="side of a patch, in pixels")


class ExactDistanceSpec(Section):
    """The cost of the optimal assignment."""

    kind: Literal["exact"]


class SinkhornDistanceSpec(Section):
    """The Sinkhorn divergence: the entropic cost minus half of the entropic costs of each side with itself."""

    kind: Literal["sinkhorn-divergence"]
    epsilon: float = Field(
        default=10.0,
        gt=0,
        description="entropic regularisation, in units of the cost; with features, in units of the mean cost between "
        "two real images",
    )


class SlicedDistanceSpec(Section):
    """The mean squared transport distance of projections onto random lines, for the squared Euclidean cost."""

    kind: Literal["sliced"]
    directions: int = Field(default=256, ge=1, le=65536, description="number of random lines, drawn at each step")


DistanceSpec = Annotated[ExactDistanceSpec | SinkhornDistanceSpec | SlicedDistanceSpec, Field(discriminator="kind")]


class FeatureSpec(Section):
    """A feature in which a transport cost compares images: pixels, or one layer of a frozen network."""

    network: ModelReference = Field(
        default="pixels",
        description="pixels; a registered auto-encoder or classifier, NAME, NAME@ALIAS or NAME/VERSION; or "
        "imagenet-mobilenet-v2 or imagenet-efficientnet-lite0",
    )
    layer: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="layer of an auto-encoder, counted from the image; by default its code. Other networks have one "
        "feature, the input of their last layer",
    )
    side: int | None = Field(
        default=None, ge=1, le=1024, description="side to which feature maps are average-pooled; by default not pooled"
    )
    weight: float = Field(default=1.0, gt=0, le=1e6, description="weight of this feature in the cost")

    @model_validator(mode="after")
    def _check_layer(self) -> FeatureSpec:
        if self.network == "imagenet-inception-v3":
            raise ValueError("network imagenet-inception-v3 is for evaluation only; use imagenet-mobilenet-v2")
        if imagenet(self.network) and self.layer is not None:
            raise ValueError(f"layer {self.layer}: {self.network} has a single feature layer; remove layer")
        if self.network == "pixels" and self.layer is not None:
            raise ValueError(f"layer {self.layer}: pixels have no layers; remove layer")
        if self.network != "pixels" and self.layer is None and self.side is not None:
            raise ValueError(f"side {self.side}: the default layer of {self.network} is not a feature map; set layer")
        return self


class TransportSpec(Section):
    """A generator that minimises a transport distance between its samples and real images."""

    kind: Literal["transport"]
    distance: DistanceSpec = Field(default=ExactDistanceSpec(kind="exact"), description="distance to minimise")
    cost: CostName = Field(default="squared-euclidean", description="cost between a sample and an image")
    power: float = Field(default=2.0, gt=0, le=16, description="exponent p of cost `power`, ‖x − y‖ᵖ")
    class_weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default_factory=dict, description="weights of real images by class; classes not listed have weight 1"
    )
    features: tuple[FeatureSpec, ...] = Field(
        default=(),
        max_length=16,
        description="features that the cost compares, each scaled to a mean cost of 1 between two real images; by "
        "default unscaled pixels",
    )
    self_term: Literal["same-batch", "two-batch"] = Field(
        default="same-batch",
        description="with features, the plan that keeps samples apart: between the batch and itself, or between the "
        "two halves of the batch; the bias of finite batches cancels if reals equals the number of samples in a half",
    )
    pool: int | None = Field(
        default=None,
        ge=1,
        le=16384,
        description="with features, number of samples generated at once, a multiple of train.batch: their plans are "
        "solved once and used for pool / train.batch steps; with self_term two-batch, each plan holds half of them. By "
        "default, plans are solved at every step, for the samples of that step",
    )
    reals: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="with features, number of real images in each plan; by default train.batch, or with a pool or a "
        "conditional model the number of samples in each plan",
    )
    condition_weight: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="with features, for a conditional model: extra cost of pairing a sample of one class with an image "
        "of another class, in units of the mean cost; 10 practically forbids it",
    )
    components: int | None = Field(
        default=256,
        ge=1,
        le=65536,
        description="with features, number of principal components of the real images in which plans compare points; "
        "samples still move in all dimensions. null: plans compare all dimensions",
    )
    normalise: bool = Field(
        default=False, description="with features, divide the drift of the samples by its root mean square"
    )
    plans: Literal["service", "local"] = Field(
        default="service", description="where exact plans are solved: in the transport service, or on every rank"
    )

    @model_validator(mode="after")
    def _features_fit(self) -> TransportSpec:
        if self.features:
            if isinstance(self.distance, SlicedDistanceSpec):
                raise ValueError("distance sliced does not support features; use exact or sinkhorn-divergence")
            if self.cost != "squared-euclidean":
                raise ValueError(f"cost {self.cost!r} does not support features; use squared-euclidean")
            if self.class_weights:
                raise ValueError(f"class_weights {self.class_weights} with features; remove one of them")
            if isinstance(self.distance, SinkhornDistanceSpec) and self.distance.epsilon > 1:
                raise ValueError(
                    f"distance.epsilon {self.distance.epsilon:g} is too large for features, where the mean cost "
                    "between two real images is 1; use about 0.01"
                )
            if self.pool is not None and self.normalise:
                raise ValueError(
                    f"normalise with pool {self.pool}: the samples of a pool move to fixed targets, so their drift "
                    "cannot be scaled; remove one of them"
                )
            return self
        for name in ("self_term", "pool", "reals", "condition_weight", "components", "normalise"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} {getattr(self, name)} requires objective.features")
        return self

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the networks of the features, without duplicates."""
        return tuple(dict.fromkeys(one.network for one in self.features if one.network != "pixels"))

    @property
    def registered(self) -> tuple[str, ...]:
        """Names of those networks that are registered models."""
        return tuple(name for name in self.networks if imagenet(name) is None)

    @model_validator(mode="after")
    def _check_sliced_weights(self) -> TransportSpec:
        if isinstance(self.distance, SlicedDistanceSpec) and self.class_weights:
            raise ValueError(f"class_weights {self.class_weights}: distance sliced supports only uniform weights")
        return self

    @model_validator(mode="after")
    def _check_sliced_cost(self) -> TransportSpec:
        if isinstance(self.distance, SlicedDistanceSpec) and self.cost != "squared-euclidean":
            raise ValueError(f"cost {self.cost!r}: distance sliced supports only squared-euclidean")
        return self


class IndependentSpec(Section):
    """Independent noise for each image."""

    kind: Literal["independent"]


class BatchPlanSpec(Section):
    """The optimal plan between noise and images of each global batch."""

    kind: Literal["batch"]
    condition_weight: float = Field(
        default=0.0,
        ge=0,
        description="for a conditional model: extra cost of pairing noise of one class with an image of another "
        "class, in units of the squared distance between pixels in [−1, 1]",
    )


class PoolPlanSpec(Section):
    """Optimal plans between pools much larger than a batch, solved ahead of the training."""

    kind: Literal["pool"]
    points: int = Field(
        default=4096,
        ge=1,
        le=65536,
        description="number of noise vectors, and of images, in a pool; a multiple of train.batch",
    )
    condition_weight: float = Field(
        default=0.0,
        ge=0,
        description="for a conditional model: extra cost of pairing noise of one class with an image of another "
        "class, in units of the squared distance between pixels in [−1, 1]",
    )


class RecordedSpec(Section):
    """Pairs that `monge couple` computed for the whole data set."""

    kind: Literal["recorded"]
    file: str = Field(min_length=1, description="path of the file that `monge couple` wrote")


CouplingSpec = Annotated[IndependentSpec | BatchPlanSpec | PoolPlanSpec | RecordedSpec, Field(discriminator="kind")]


class FlowSpec(Section):
    """Flow matching: a velocity field that carries noise to images along coupled pairs."""

    kind: Literal["flow"]
    coupling: CouplingSpec = Field(default=PoolPlanSpec(kind="pool"), description="coupling of noise and images")
    plans: Literal["service", "local"] = Field(
        default="service", description="where plans are solved: in the transport service, or on every rank"
    )


class GanSpec(Section):
    """A generator against a critic that discriminates its samples from real images."""

    kind: Literal["gan"]
    loss: Literal["zero-sum", "non-saturating", "hinge"] = Field(
        default="non-saturating", description="losses of generator and critic"
    )
    orthogonal: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="weight of the orthogonal penalty on the generator's weights; 0.0001 for BigGAN",
    )
    critic: CriticSpec = Field(default=CriticSpec(), description="network and optimizer of the critic")
    critic_steps: int = Field(default=1, ge=1, le=100, description="updates of the critic per update of the generator")


class WassersteinSpec(Section):
    """A generator against a critic that estimates the 1-Wasserstein distance to real images."""

    kind: Literal["wasserstein"]
    constraint: Literal["gradient-penalty", "clip", "none"] = Field(
        default="gradient-penalty",
        description="constraint that keeps the critic Lipschitz; none: critic.spectral must be true",
    )
    penalty: float = Field(default=10.0, gt=0, description="weight of the gradient penalty")
    clip: float = Field(default=0.01, gt=0, description="largest absolute value of a weight, for constraint `clip`")
    critic: CriticSpec = Field(default=CriticSpec(), description="network and optimizer of the critic")
    critic_steps: int = Field(default=5, ge=1, le=100, description="updates of the critic per update of the generator")


class LearnedTransportSpec(Section):
    """A generator that minimises a transport distance; a critic learns the cost so as to maximise the distance."""

    kind: Literal["learned-transport"]
    critic: CriticSpec = Field(default=CriticSpec(), description="network and optimizer of the critic")
    features: int = Field(default=128, ge=2, le=4096, description="dimension of the critic's embedding of an image")
    epsilon: float = Field(default=0.05, ge=0, description="entropic regularisation of the plans; 0: exact plans")
    critic_every: int = Field(default=3, ge=1, le=100, description="updates of the generator per update of the critic")
    penalty: float = Field(default=0.1, ge=0, description="weight of the gradient penalty on the critic")
    plans: Literal["service", "local"] = Field(
        default="service", description="where plans are solved: in the transport service, or on every rank"
    )


ObjectiveSpec = Annotated[
    ClassificationSpec
    | RegressionSpec
    | ReconstructionSpec
    | TransportSpec
    | GanSpec
    | WassersteinSpec
    | LearnedTransportSpec
    | FlowSpec,
    Field(discriminator="kind"),
]
