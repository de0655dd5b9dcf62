"""Construction of a network from its spec."""

from __future__ import annotations

from pipelines.models.alexnet import AlexNet
from pipelines.models.autoencoder import AutoEncoder
from pipelines.models.biggan import BigGan
from pipelines.models.classifiers import MLP, LeNet, Perceptron
from pipelines.models.flow import FlowUNet
from pipelines.models.generators import ConvGenerator
from pipelines.models.network import Classifier, Encoder, Generator
from pipelines.models.resnet import ResNet
from pipelines.shape import ImageShape
from pipelines.spec import (
    AlexNetSpec,
    AutoEncoderSpec,
    BigGanSpec,
    ConvGeneratorSpec,
    FlowUNetSpec,
    LeNetSpec,
    MLPSpec,
    ModelSpec,
    PerceptronSpec,
    ResNetSpec,
)


def build_model(spec: ModelSpec, image: ImageShape, classes: int) -> Classifier | Encoder | Generator:
    """Build the network that a spec describes, with PyTorch's default initialisation.

    Args:
        spec: kind and sizes of the network.
        image: shape of its input or output images.
        classes: number of classes of the data.

    Raises:
        SpecError: the network does not support images of this shape.
    """
    match spec:
        case PerceptronSpec():
            return Perceptron(image, classes)
        case MLPSpec():
            return MLP(image, classes, spec.hidden, spec.dropout)
        case LeNetSpec():
            return LeNet(image, classes, spec.dropout)
        case AlexNetSpec():
            return AlexNet(image, classes, spec.hidden, spec.dropout)
        case ResNetSpec():
            return ResNet(image, classes, spec.depth, spec.width)
        case AutoEncoderSpec():
            return AutoEncoder(image, spec.width, spec.code)
        case ConvGeneratorSpec():
            return ConvGenerator(
                image,
                spec.latent,
                spec.width,
                upsampling=spec.upsampling,
                batch_norm=spec.normalisation == "batch",
                conditions=classes if spec.conditional else 0,
            )
        case BigGanSpec():
            return BigGan(image, spec.latent, spec.width, classes)
        case FlowUNetSpec():
            return FlowUNet(image, spec.width, spec.steps, classes if spec.conditional else 0)
