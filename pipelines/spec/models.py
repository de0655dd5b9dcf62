"""Section ``model`` of the spec: one class per network."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipelines.spec.section import Section
from pipelines.spec.training import OptimizerSpec

Upsampling = Literal["nearest", "transposed", "filtered"]


class PerceptronSpec(Section):
    """One linear layer (Rosenblatt 1958)."""

    kind: Literal["perceptron"]


class MLPSpec(Section):
    """Fully connected ReLU layers."""

    kind: Literal["mlp"]
    hidden: tuple[Annotated[int, Field(ge=1, le=65536)], ...] = Field(
        default=(256,),
        min_length=1,
        description="widths of the hidden layers; a single width gives a two-layer network",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout probability of hidden units")


class LeNetSpec(Section):
    """LeNet-5 (LeCun et al. 1998) with ReLU, max pooling and dropout."""

    kind: Literal["lenet"]
    dropout: float = Field(
        default=0.5, ge=0, lt=1, description="dropout probability of the first fully connected layer"
    )


class AlexNetSpec(Section):
    """AlexNet (Krizhevsky et al. 2012), for images of 8 pixels or more."""

    kind: Literal["alexnet"]
    hidden: int = Field(default=4096, ge=1, le=65536, description="units of each hidden fully connected layer")
    dropout: float = Field(
        default=0.5, ge=0, lt=1, description="dropout probability of the inputs of the hidden fully connected layers"
    )


class ResNetSpec(Section):
    """A residual network (He et al. 2016), for images of any size."""

    kind: Literal["resnet"]
    depth: Literal[10, 18, 34, 50] = Field(default=18, description="number of layers; 50 uses bottleneck blocks")
    width: int = Field(default=64, ge=1, le=512, description="channels of the first stage")


class AutoEncoderSpec(Section):
    """A convolutional auto-encoder; its layers can be features of the objective `transport`."""

    kind: Literal["autoencoder"]
    width: int = Field(default=32, ge=4, le=512, description="channels of the first layer")
    code: int = Field(default=128, ge=1, le=4096, description="dimension of the code")


class ConvGeneratorSpec(Section):
    """A convolutional generator: maps a latent vector to a small feature map, then upsamples (Radford et al. 2016)."""

    kind: Literal["conv-generator"]
    latent: int = Field(default=64, ge=1, le=4096, description="dimension of the latent vector")
    width: int = Field(default=32, ge=4, le=512, description="channels of the last hidden layer")
    upsampling: Upsampling = Field(
        default="nearest",
        description="nearest: nearest-neighbour upsampling, then a convolution; transposed: a transposed convolution, "
        "2.4 times as fast, which may cause checkerboard artifacts; filtered: a transposed convolution with a filter "
        "that prevents them",
    )
    normalisation: Literal["group", "batch"] = Field(
        default="group",
        description="group: normalise within each image; batch: over the global batch, which reduces mode collapse "
        "in adversarial training",
    )
    conditional: bool = Field(default=False, description="condition the generator on the class")


class BigGanSpec(Section):
    """A class-conditional generator of residual blocks (Brock et al. 2019)."""

    kind: Literal["biggan"]
    latent: int = Field(
        default=80, ge=8, le=4096, description="dimension of the latent vector; each block receives a part of it"
    )
    width: int = Field(default=32, ge=4, le=512, description="channels of the last block")


class FlowUNetSpec(Section):
    """A U-Net that predicts the velocity of a flow from noise to images (Lipman et al. 2023)."""

    kind: Literal["flow-unet"]
    width: int = Field(default=64, ge=8, le=512, multiple_of=8, description="channels at the first resolution")
    steps: int = Field(default=8, ge=1, le=1000, description="Euler steps from noise to image when sampling")
    conditional: bool = Field(default=False, description="condition the flow on the class")


class CriticSpec(Section):
    """The critic of an adversarial objective; conditional if the generator is conditional."""

    network: Literal["convolutional", "residual"] = Field(
        default="convolutional",
        description="convolutional: strided convolutions; residual: BigGAN's residual blocks",
    )
    width: int = Field(default=64, ge=4, le=512, description="channels of the first layer or block")
    spectral: bool = Field(default=False, description="divide each layer's weights by their spectral norm")
    optimizer: OptimizerSpec | None = Field(
        default=None, description="optimizer of the critic; by default that of the job"
    )


ModelSpec = Annotated[
    PerceptronSpec
    | MLPSpec
    | LeNetSpec
    | AlexNetSpec
    | ResNetSpec
    | AutoEncoderSpec
    | ConvGeneratorSpec
    | BigGanSpec
    | FlowUNetSpec,
    Field(discriminator="kind"),
]
GeneratorSpec = ConvGeneratorSpec | BigGanSpec | FlowUNetSpec
