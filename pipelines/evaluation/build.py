"""Construction of the evaluation of an objective."""

from __future__ import annotations

import numpy as np
import torch

from pipelines.data.loader import ShardedDataset
from pipelines.data.split import SplitName
from pipelines.data.targets import TargetName
from pipelines.distributed import rank
from pipelines.errors import ShardError
from pipelines.evaluation import classification, generation, regression
from pipelines.evaluation.features import FeatureExtractor
from pipelines.evaluation.figures import (
    MOST_NAMED,
    TILE,
    approximation_figure,
    calibration_figure,
    confusion_figure,
    image_grid,
    predictions_figure,
    weights_figure,
)
from pipelines.evaluation.judging import FeatureJudge
from pipelines.evaluation.reconstruction import reconstruction
from pipelines.evaluation.result import Evaluation
from pipelines.models.autoencoder import AutoEncoder
from pipelines.models.bundle import to_uint8
from pipelines.models.classifiers import Perceptron
from pipelines.models.network import Classifier, Generator
from pipelines.spec import JobSpec, ObjectiveSpec, ReconstructionSpec, RegressionSpec, TransportSpec, WassersteinSpec
from pipelines.transport.planner import Planner

GRID = 64


def _judged_by(objective: ObjectiveSpec) -> TransportSpec:
    """The cost of the distance to held-out images: that of the objective if it compares pixels."""
    match objective:
        case TransportSpec():
            return objective
        case WassersteinSpec():  # its critic estimates this distance
            return TransportSpec(kind="transport", cost="euclidean")
    return TransportSpec(kind="transport")


class Evaluator:
    """Evaluates the served network of a job on held-out images.

    Collective: every rank creates an evaluator, calls it, and processes a part of the images. Only rank 0 returns the
    pictures, and the metrics of a generator.

    Args:
        spec: spec of the job.
        data: data set with the splits.
        planner: solver of the plans of transport distances.
        device: device of the network.
        reference: feature extractor for the evaluation of generators, if the spec has one.
        split: held-out split; a prefix of the names of the metrics.

    Raises:
        ShardError: there are no held-out images.
        SpecError: the reference does not support such images.
    """

    def __init__(
        self,
        spec: JobSpec,
        data: ShardedDataset,
        planner: Planner,
        device: torch.device,
        reference: FeatureExtractor | None = None,
        split: SplitName = "test",
    ) -> None:
        if not len(data.test):
            raise ShardError("the test split is empty", hint="add images, or change data.test_fraction")
        self._data = data
        self._split: SplitName = split
        self._device = device
        self._seed = spec.seed
        self._judge = None
        self._objective = spec.objective
        self._target = spec.objective.target if isinstance(spec.objective, RegressionSpec) else None
        if spec.generates:
            judged = _judged_by(spec.objective)
            self._judge = generation.TransportJudge(
                data.split("train"), data.split(split), judged.cost, planner, spec.seed, judged.power
            )
        self._features = None
        if reference is not None:
            reference.require(data.image)
            self._features = FeatureJudge(
                reference,
                data.split("train"),
                data.split(split),
                spec.evaluation.samples,
                spec.seed,
                device,
                data.classes,
            )

    def __call__(self, network: torch.nn.Module) -> Evaluation:
        """Compute metrics and pictures of a network."""
        if isinstance(network, Classifier):
            return self._classifier(network) if self._target is None else self._regressor(network, self._target)
        if isinstance(network, AutoEncoder):
            return self._autoencoder(network)
        if not isinstance(network, Generator):
            raise TypeError(f"no evaluation is known for a {type(network).__name__}")
        assert self._judge is not None
        samples = self._judge.samples(network, self._device)
        scores, neighbours = {}, None
        if self._features is not None:
            scores = self._features.scores(network)
            neighbours = self._features.neighbours(network)
        if rank() != 0:
            return Evaluation({}, {})
        distances = self._judge.distances(samples)
        metrics = {
            "transport_cost": distances.generator,
            "transport_cost_gaussian": distances.gaussian_baseline,
            "transport_cost_real": distances.real_floor,
            "transport_points": float(distances.points),
            "transport_max_gap": distances.max_gap,
            "sliced_cost": distances.sliced,
            "sliced_cost_gaussian": distances.sliced_gaussian,
            "sliced_cost_real": distances.sliced_real,
            "sample_spread": distances.spread,
        } | scores
        shown = to_uint8(generation.sample(network, GRID, self._seed, self._device)).cpu().numpy()
        pictures, tags = {"samples": image_grid(shown, tile=TILE)}, {"transport_solver": distances.solver}
        if self._features is not None and neighbours is not None:
            pictures["neighbours"] = neighbours
            tags["feature_extractor"] = self._features.extractor.identity
        return Evaluation({f"{self._split}_{name}": value for name, value in metrics.items()}, pictures, tags)

    def _classifier(self, network: Classifier) -> Evaluation:
        side = self._split
        train, test = self._data.split("train"), self._data.split(side)
        metrics = {f"{side}_{name}": v for name, v in classification.accuracy(network, test, self._device).items()}
        # Both without dropout and augmentation, so that their difference is the generalisation gap.
        metrics[f"{side}_error"] = 1 - metrics[f"{side}_accuracy"]
        metrics["train_error"] = 1 - classification.accuracy(network, train, self._device, most=len(test))["accuracy"]
        if rank() != 0:
            return Evaluation(metrics, {})
        pictures = {"predictions": classification.predictions(network, test, self._data.classes, self._device)}
        rows, labels = classification.probabilities(network, test, self._device)
        error, table = classification.calibration(rows, labels)
        counts = classification.confusion(rows, labels)
        recalls = counts.diagonal() / np.maximum(counts.sum(1), 1)
        metrics |= {f"{side}_calibration_error": error, f"{side}_lowest_class_accuracy": float(recalls.min())}
        if len(recalls) <= MOST_NAMED:
            of_class = zip(self._data.classes, recalls.tolist(), strict=True)
            metrics |= {f"{side}_accuracy_of_{name}": value for name, value in of_class}
            if isinstance(network, Perceptron):
                pictures["weights"] = weights_figure(network.weights.detach().cpu().numpy(), self._data.classes)
        chosen = classification.worst(rows, labels, classification.EXAMPLES)
        pictures["confusion"] = confusion_figure(counts, self._data.classes)
        pictures["calibration"] = calibration_figure(table, error)
        images = test.take(chosen)[0].numpy()
        pictures["worst"] = predictions_figure(images, rows[chosen], self._data.classes, labels[chosen])
        return Evaluation(metrics, pictures)

    def _autoencoder(self, network: AutoEncoder) -> Evaluation:
        assert isinstance(self._objective, ReconstructionSpec)
        held_out = self._data.split(self._split)
        numbers, picture = reconstruction(network, held_out, self._objective, self._seed, self._device)
        metrics = {f"{self._split}_{name}": value for name, value in numbers.items()}
        return Evaluation(metrics, {"reconstructions": picture} if rank() == 0 else {})

    def _regressor(self, network: Classifier, target: TargetName) -> Evaluation:
        train, test = self._data.split("train"), self._data.split(self._split)
        metrics = {}
        for name, split in (("train", train), (self._split, test)):
            rows = regression.approximation(network, split, target, self._device, most=len(test))
            metrics[f"{name}_error"] = regression.mean_squared_error(rows)
        return Evaluation(metrics, {"approximation": approximation_figure(rows)} if rank() == 0 else {})
