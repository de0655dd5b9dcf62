"""The spec's section on what is minimised, one class for each objective."""

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
    loss: Literal["cross-entropy", "least-squares"] = "cross-entropy"
    flip: bool = Field(default=False, description="mirror half of the training images left to right")
    shift: int = Field(default=0, ge=0, le=64, description="pixels by which training images are moved at most")
    cutout: int = Field(default=0, ge=0, le=256, description="side of a square that is blanked in training images")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="fraction of each label that is spread evenly over all classes"
    )
    mixup: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="α: each image is mixed with another one of the batch, weights from Beta(α, α)",
    )
    cutmix: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="α: rectangles of other images are pasted, of areas drawn from Beta(α, α)",
    )

    @property
    def mixes(self) -> bool:
        """Whether an image is trained on together with another one of its batch."""
        return self.mixup > 0 or self.cutmix > 0

    @model_validator(mode="after")
    def _mix_in_one_way(self) -> ClassificationSpec:
        if self.mixup and self.cutmix:
            raise ValueError(f"mixup {self.mixup} and cutmix {self.cutmix} exclude each other; set one of them to 0")
        return self


class RegressionSpec(Section):
    """Least squares between the one output of a network and a continuous function of the image."""

    kind: Literal["regression"]
    target: Literal["waves", "cone"] = Field(
        default="waves",
        description="of the mean brightness u, v in [−1, 1] of an image's left and right half: sin(πu) sin(πv), or "
        "√(u² + v²)",
    )


class ReconstructionSpec(Section):
    """An auto-encoder that makes whole images of images with hidden patches; labels are not used."""

    kind: Literal["reconstruction"]
    hidden: float = Field(default=0.5, ge=0, lt=1, description="fraction of the patches that are hidden")
    patch: int = Field(default=4, ge=1, le=256, description="side of a patch, in pixels")


class ExactDistanceSpec(Section):
    """The cost of the optimal assignment."""

    kind: Literal["exact"]


class SinkhornDistanceSpec(Section):
    """The Sinkhorn divergence: entropic costs, less those of each side with itself."""

    kind: Literal["sinkhorn-divergence"]
    epsilon: float = Field(
        default=10.0,
        gt=0,
        description="entropic regularisation, in units of the cost; in features, of the mean cost between two real "
        "images",
    )


class SlicedDistanceSpec(Section):
    """The mean squared transport distance of projections on random lines; for the squared Euclidean cost."""

    kind: Literal["sliced"]
    directions: int = Field(default=256, ge=1, le=65536, description="lines, new ones at each step")


DistanceSpec = Annotated[ExactDistanceSpec | SinkhornDistanceSpec | SlicedDistanceSpec, Field(discriminator="kind")]


class FeatureSpec(Section):
    """What a transport cost compares: pixels, or one layer of a network that is not trained by this job."""

    network: ModelReference = Field(
        default="pixels",
        description="pixels; a registered auto-encoder or classifier, NAME, NAME@ALIAS or NAME/VERSION; or "
        "imagenet-mobilenet-v2 or imagenet-efficientnet-lite0",
    )
    layer: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="of an auto-encoder, counted from the image; by default its code. Of the other networks, what "
        "their last layer is given",
    )
    side: int | None = Field(
        default=None, ge=1, le=1024, description="pixels a side to which maps are averaged; as they are by default"
    )
    weight: float = Field(default=1.0, gt=0, le=1e6, description="weight of this feature in the cost")

    @model_validator(mode="after")
    def _of_maps(self) -> FeatureSpec:
        if self.network == "imagenet-inception-v3":
            raise ValueError("network imagenet-inception-v3 judges alone; use imagenet-mobilenet-v2")
        if imagenet(self.network) and self.layer is not None:
            raise ValueError(f"layer {self.layer} of {self.network}, which has one alone; leave layer out")
        if self.network == "pixels" and self.layer is not None:
            raise ValueError(f"layer {self.layer} of pixels; layers are of networks")
        if self.network != "pixels" and self.layer is None and self.side is not None:
            raise ValueError(f"side {self.side} of what {self.network} ends with, which is no map; give a layer")
        return self


class TransportSpec(Section):
    """A generator that minimises a transport distance between its samples and real images."""

    kind: Literal["transport"]
    distance: DistanceSpec = ExactDistanceSpec(kind="exact")
    cost: CostName = "squared-euclidean"
    power: float = Field(default=2.0, gt=0, le=16, description="the exponent p of cost `power`, ‖x − y‖ᵖ")
    class_weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default_factory=dict, description="what a real image weighs by its class; 1 where none is given"
    )
    features: tuple[FeatureSpec, ...] = Field(
        default=(),
        max_length=16,
        description="what the cost compares, each scaled to a mean cost of 1 between two real images; by default "
        "pixels as they are",
    )
    self_term: Literal["same-batch", "two-batch"] = Field(
        default="same-batch",
        description="in features, what samples are compared with to keep them apart: themselves, or each half of them "
        "with the other half; the bias of finite batches cancels when reals equals the number of samples in a half",
    )
    pool: int | None = Field(
        default=None,
        ge=1,
        le=16384,
        description="in features, number of samples generated at once, a multiple of train.batch: their plans are "
        "solved once and used for pool / train.batch steps; with self_term two-batch, each plan holds half of them. By "
        "default, plans are solved at every step, between the samples of that step",
    )
    reals: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="in features, real images in each plan; by default train.batch; with a pool or a conditional "
        "model, as many as there are samples in each plan",
    )
    condition_weight: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="in features, for a conditional model: what plans pay for a sample of one class and an image of "
        "another, in units of the mean cost; 10 all but forbids it",
    )
    components: int | None = Field(
        default=256,
        ge=1,
        le=65536,
        description="in features, principal components of real images by which plans compare points, while samples "
        "are moved in all numbers; null: plans compare all numbers",
    )
    normalise: bool = Field(
        default=False, description="in features, divide the drift of the samples by its root mean square"
    )
    plans: Literal["service", "local"] = Field(
        default="service", description="who solves exact plans: the transport service, or each rank for itself"
    )

    @model_validator(mode="after")
    def _features_fit(self) -> TransportSpec:
        if self.features:
            if isinstance(self.distance, SlicedDistanceSpec):
                raise ValueError("distance sliced in features; use exact or sinkhorn-divergence")
            if self.cost != "squared-euclidean":
                raise ValueError(f"cost {self.cost!r} in features; they know squared-euclidean alone")
            if self.class_weights:
                raise ValueError(f"class_weights {self.class_weights} in features; leave one of them out")
            if isinstance(self.distance, SinkhornDistanceSpec) and self.distance.epsilon > 1:
                raise ValueError(
                    f"distance.epsilon {self.distance.epsilon:g} in features, where the mean cost between two real "
                    "images is 1; use about 0.01"
                )
            if self.pool is not None and self.normalise:
                raise ValueError(
                    f"normalise with pool {self.pool}: the samples of a pool move to fixed targets, whose distance is "
                    "not free; leave one of them out"
                )
            return self
        for name in ("self_term", "pool", "reals", "condition_weight", "components", "normalise"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} {getattr(self, name)} without features; give objective.features")
        return self

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the networks whose layers are compared, each once."""
        return tuple(dict.fromkeys(one.network for one in self.features if one.network != "pixels"))

    @property
    def registered(self) -> tuple[str, ...]:
        """Those of them that are registered models."""
        return tuple(name for name in self.networks if imagenet(name) is None)

    @model_validator(mode="after")
    def _sorts_points_that_weigh_the_same(self) -> TransportSpec:
        if isinstance(self.distance, SlicedDistanceSpec) and self.class_weights:
            raise ValueError(f"class_weights {self.class_weights} with distance sliced, which takes uniform ones alone")
        return self

    @model_validator(mode="after")
    def _squares_on_lines(self) -> TransportSpec:
        if isinstance(self.distance, SlicedDistanceSpec) and self.cost != "squared-euclidean":
            raise ValueError(f"cost {self.cost!r} with distance sliced; it knows squared-euclidean alone")
        return self


class IndependentSpec(Section):
    """Fresh noise for each image."""

    kind: Literal["independent"]


class BatchPlanSpec(Section):
    """The optimal plan between noise and images of each global batch."""

    kind: Literal["batch"]
    condition_weight: float = Field(
        default=0.0,
        ge=0,
        description="for a conditional model: what the plan pays for noise meant for one class and an image of "
        "another, in units of the squared distance of pixels in [−1, 1]",
    )


class PoolPlanSpec(Section):
    """Optimal plans between pools much larger than a batch, solved ahead of the training."""

    kind: Literal["pool"]
    points: int = Field(
        default=4096, ge=1, le=65536, description="of noise and of images in a pool; a multiple of train.batch"
    )
    condition_weight: float = Field(
        default=0.0,
        ge=0,
        description="for a conditional model: what the plan pays for noise meant for one class and an image of "
        "another, in units of the squared distance of pixels in [−1, 1]",
    )


class RecordedSpec(Section):
    """Pairs that `monge couple` solved for the whole data set."""

    kind: Literal["recorded"]
    file: str = Field(min_length=1, description="what `monge couple` wrote")


CouplingSpec = Annotated[IndependentSpec | BatchPlanSpec | PoolPlanSpec | RecordedSpec, Field(discriminator="kind")]


class FlowSpec(Section):
    """Flow matching: a velocity field that carries noise to images along coupled pairs."""

    kind: Literal["flow"]
    coupling: CouplingSpec = PoolPlanSpec(kind="pool")
    plans: Literal["service", "local"] = Field(
        default="service", description="who solves the plans: the transport service, or each rank for itself"
    )


class GanSpec(Section):
    """The game between a generator and a critic that tells its samples from real images."""

    kind: Literal["gan"]
    loss: Literal["zero-sum", "non-saturating", "hinge"] = Field(
        default="non-saturating", description="what the players minimise; of a zero-sum game, the same number"
    )
    orthogonal: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="weight of the orthogonal penalty on the generator's weights; 0.0001 for BigGAN",
    )
    critic: CriticSpec = CriticSpec()
    critic_steps: int = Field(default=1, ge=1, le=100, description="moves of the critic for one of the generator")


class WassersteinSpec(Section):
    """A generator against a critic that estimates the 1-Wasserstein distance to real images."""

    kind: Literal["wasserstein"]
    constraint: Literal["gradient-penalty", "clip", "none"] = Field(
        default="gradient-penalty", description="what keeps the critic 1-Lipschitz; none: critic.spectral does"
    )
    penalty: float = Field(default=10.0, gt=0, description="weight of the gradient penalty")
    clip: float = Field(default=0.01, gt=0, description="largest weight in absolute value, of constraint `clip`")
    critic: CriticSpec = CriticSpec()
    critic_steps: int = Field(default=5, ge=1, le=100, description="moves of the critic for one of the generator")


class LearnedTransportSpec(Section):
    """A generator that minimises a transport distance whose cost a critic learns, to make it large."""

    kind: Literal["learned-transport"]
    critic: CriticSpec = CriticSpec()
    features: int = Field(default=128, ge=2, le=4096, description="numbers in which the critic embeds an image")
    epsilon: float = Field(default=0.05, ge=0, description="entropic regularisation of the plans; 0: exact ones")
    critic_every: int = Field(default=3, ge=1, le=100, description="moves of the generator for one of the critic")
    penalty: float = Field(default=0.1, ge=0, description="weight of the penalty on the critic's slope")
    plans: Literal["service", "local"] = Field(
        default="service", description="who solves the plans: the transport service, or each rank for itself"
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
