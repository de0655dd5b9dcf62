"""Sections ``optimizer``, ``train``, ``evaluation`` and ``workers`` of the spec."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from pipelines.spec.section import ImageCount, ModelReference, Section

ImageNetName = Literal["imagenet-mobilenet-v2", "imagenet-efficientnet-lite0", "imagenet-inception-v3"]
"""Networks with pretrained ImageNet weights; evaluations of generators can use their features."""


def imagenet(name: str) -> ImageNetName | None:
    """The ImageNet network of that name, or None if the name is that of a registered model."""
    return next((known for known in get_args(ImageNetName) if known == name), None)


class OptimizerSpec(Section):
    """Optimizer and learning rate schedule."""

    kind: Literal["adam", "sgd"] = Field(default="adam", description="algorithm")
    learning_rate: float = Field(default=1e-3, gt=0, description="learning rate")
    weight_decay: float = Field(
        default=0.0, ge=0, description="weight decay; decoupled from the gradient for adam (AdamW)"
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of sgd, or decay of adam's first moment")
    second_moment: float = Field(default=0.999, ge=0, lt=1, description="decay of adam's second moment")
    nesterov: bool = Field(default=False, description="use Nesterov momentum in sgd")
    schedule: Literal["constant", "cosine", "one-cycle"] = Field(
        default="constant",
        description="cosine: the rate falls to zero over the run; one-cycle: the rate rises linearly to learning_rate "
        "over the first fifth of the run, then falls linearly to zero",
    )


class TrainSpec(Section):
    """Length, batches and intervals of the training."""

    images: ImageCount = Field(description="number of images seen by the whole run")
    batch: int = Field(default=128, ge=1, description="global batch: number of images per step over all workers")
    accumulate: int = Field(
        default=1, ge=1, description="number of parts in which each worker processes its share of a batch"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="precision of matrix products and convolutions in training; weights are always float32. Devices "
        "that do not support bfloat16 compute in float32",
    )
    channels_last: bool = Field(default=False, description="use the channels_last memory format")
    compile: bool = Field(default=False, description="compile the networks with torch.compile; requires a C++ compiler")
    ema_half_life: int | None = Field(
        default=None,
        ge=1,
        description="half-life of the exponential moving average of the weights, in images; by default no average",
    )
    log_every: ImageCount = Field(default=2_000, description="number of images between two points of a curve")
    evaluate_every: ImageCount = Field(
        default=20_000, description="number of images between two evaluations on the held-out split"
    )
    checkpoint_every: ImageCount = Field(default=20_000, description="number of images between two checkpoints")


class EvaluationSpec(Section):
    """Evaluation of generators, in addition to their transport distance to held-out images."""

    reference: ModelReference | None = Field(
        default=None,
        description="network whose features give FID, KID, precision, recall, density and coverage: a registered "
        "classifier of such images, NAME, NAME@ALIAS or NAME/VERSION, or a network trained on ImageNet: "
        "imagenet-mobilenet-v2, imagenet-efficientnet-lite0, imagenet-inception-v3",
    )
    weights: str | None = Field(
        default=None,
        min_length=1,
        description="path of the state dict of imagenet-inception-v3: a .safetensors or .pth file with torchvision's "
        "parameter names",
    )
    samples: int = Field(default=5_000, ge=100, le=100_000, description="number of samples generated for these metrics")

    @model_validator(mode="after")
    def _weights_of_inception(self) -> EvaluationSpec:
        if (self.reference == "imagenet-inception-v3") != (self.weights is not None):
            raise ValueError(
                f"reference {self.reference!r} with weights {self.weights!r}: weights are required for "
                "imagenet-inception-v3 and not allowed for other references"
            )
        return self

    @property
    def imagenet(self) -> ImageNetName | None:
        """The reference if it is an ImageNet network, else None."""
        return None if self.reference is None else imagenet(self.reference)

    @property
    def registered(self) -> str | None:
        """The reference if it is a registered classifier, else None."""
        return self.reference if self.imagenet is None else None


class WorkersSpec(Section):
    """Workers of the job."""

    count: int = Field(default=2, ge=1, le=4096, description="number of distributed workers")
    min: int | None = Field(
        default=None,
        ge=1,
        description="smallest number of workers to run with if the cluster has no room for all; by default count",
    )
    device: Literal["auto", "cpu", "gpu"] = Field(
        default="auto", description="device of the workers; auto: GPUs if the cluster has enough"
    )
    max_failures: int = Field(
        default=3,
        ge=0,
        description="number of restarts of the workers; the next failure ends the attempt",
    )

    @model_validator(mode="after")
    def _min_is_within_count(self) -> WorkersSpec:
        if self.min is not None and self.min > self.count:
            raise ValueError(f"min {self.min} is more than count {self.count}")
        return self

    @property
    def fewest(self) -> int:
        """Smallest number of workers with which the job starts."""
        return self.count if self.min is None else self.min
