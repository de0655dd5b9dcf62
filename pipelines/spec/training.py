"""The spec's sections on how a job trains, and on what."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from pipelines.spec.section import ImageCount, ModelReference, Section

ImageNetName = Literal["imagenet-mobilenet-v2", "imagenet-efficientnet-lite0", "imagenet-inception-v3"]
"""Networks that others trained on ImageNet, by whose features generators can be judged."""


def imagenet(name: str) -> ImageNetName | None:
    """The ImageNet network of that name; None for other names, which are those of registered models."""
    return next((known for known in get_args(ImageNetName) if known == name), None)


class OptimizerSpec(Section):
    """How weights follow gradients."""

    kind: Literal["adam", "sgd"] = "adam"
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled from the gradient for adam (AdamW)")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of sgd; adam's first moment")
    second_moment: float = Field(default=0.999, ge=0, lt=1, description="of adam alone")
    nesterov: bool = Field(default=False, description="sgd looks ahead along its momentum")
    schedule: Literal["constant", "cosine", "one-cycle"] = Field(
        default="constant",
        description="cosine: the rate falls to zero over the run; one-cycle: it rises to the given rate over the "
        "first fifth, then falls to zero, both in a straight line",
    )


class TrainSpec(Section):
    """How long and in what steps."""

    images: ImageCount = Field(description="images seen before the run ends")
    batch: int = Field(default=128, ge=1, description="global batch: images in one step over all workers")
    accumulate: int = Field(
        default=1, ge=1, description="parts in which each worker's share of a batch passes through the network"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of matrix products and convolutions in training; weights are always float32. Devices that do not "
        "support bfloat16 compute in float32",
    )
    channels_last: bool = Field(default=False, description="keep images with their channels innermost in memory")
    compile: bool = Field(default=False, description="translate the networks by torch.compile; needs a C++ compiler")
    ema_half_life: int | None = Field(
        default=None, ge=1, description="images after which the moving average has forgotten half of a weight"
    )
    log_every: ImageCount = Field(default=2_000, description="images between two points of a curve")
    evaluate_every: ImageCount = Field(
        default=20_000, description="images between two evaluations on the held-out split"
    )
    checkpoint_every: ImageCount = Field(default=20_000, description="images between two checkpoints")


class EvaluationSpec(Section):
    """How generators are judged, beside their transport distance to held-out images."""

    reference: ModelReference | None = Field(
        default=None,
        description="a registered classifier of such images, NAME, NAME@ALIAS or NAME/VERSION, or a network trained "
        "on ImageNet: imagenet-mobilenet-v2, imagenet-efficientnet-lite0, imagenet-inception-v3. Its features give "
        "FID, KID, precision, recall, density and coverage",
    )
    weights: str | None = Field(
        default=None,
        min_length=1,
        description="the state dict of imagenet-inception-v3, a .safetensors or .pth file with torchvision's names",
    )
    samples: int = Field(default=5_000, ge=100, le=100_000, description="images drawn for these")

    @model_validator(mode="after")
    def _weights_of_inception(self) -> EvaluationSpec:
        if (self.reference == "imagenet-inception-v3") != (self.weights is not None):
            raise ValueError(
                f"reference {self.reference!r} with weights {self.weights!r}: a file of weights is for "
                "imagenet-inception-v3, which needs one"
            )
        return self

    @property
    def imagenet(self) -> ImageNetName | None:
        """The ImageNet network that judges, if one does."""
        return None if self.reference is None else imagenet(self.reference)

    @property
    def registered(self) -> str | None:
        """The registered classifier that judges, if one does."""
        return self.reference if self.imagenet is None else None


class WorkersSpec(Section):
    """What the job runs on."""

    count: int = Field(default=2, ge=1, le=4096, description="distributed workers")
    min: int | None = Field(
        default=None, ge=1, description="fewest workers to go on with where there is no room for all; count by default"
    )
    device: Literal["auto", "cpu", "gpu"] = Field(default="auto", description="auto: GPUs when the cluster has enough")
    max_failures: int = Field(
        default=3,
        ge=0,
        description="restarts of the workers until their next failure ends the attempt",
    )

    @model_validator(mode="after")
    def _min_is_within_count(self) -> WorkersSpec:
        if self.min is not None and self.min > self.count:
            raise ValueError(f"min {self.min} is more than count {self.count}")
        return self

    @property
    def fewest(self) -> int:
        """Workers without which the job does not start."""
        return self.count if self.min is None else self.min
