"""The spec's section on what is minimised, one class for each objective."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipelines.spec.section import Section

CostName = Literal["squared-euclidean", "euclidean", "power", "cosine"]


class ClassificationSpec(Section):
    """Least squares or cross-entropy between predicted probabilities and labels."""

    kind: Literal["classification"]
    loss: Literal["cross-entropy", "least-squares"] = "cross-entropy"
    flip: bool = Field(default=False, description="mirror half of the training images left to right")


class TransportSpec(Section):
    """A generator that minimises the cost of the optimal plan between its samples and real images."""

    kind: Literal["transport"]
    cost: CostName = "squared-euclidean"
    power: float = Field(default=2.0, gt=0, le=16, description="the exponent p of cost `power`, ‖x − y‖ᵖ")
    plans: Literal["service", "local"] = Field(
        default="service", description="who solves the plans: the transport service, or each rank for itself"
    )


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


ObjectiveSpec = Annotated[ClassificationSpec | TransportSpec | FlowSpec, Field(discriminator="kind")]
