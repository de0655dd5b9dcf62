"""The spec of a job: all sections and the checks between them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable

import yaml
from pydantic import Field, model_validator

from pipelines.errors import SpecError
from pipelines.spec.data import DataSpec
from pipelines.spec.models import BigGanSpec, ConvGeneratorSpec, FlowUNetSpec, ModelSpec, ResNetSpec
from pipelines.spec.objectives import (
    BatchPlanSpec,
    ClassificationSpec,
    FlowSpec,
    LearnedTransportSpec,
    ObjectiveSpec,
    PoolPlanSpec,
    ReconstructionSpec,
    RegressionSpec,
    TransportSpec,
    WassersteinSpec,
)
from pipelines.spec.section import Name, Section
from pipelines.spec.training import EvaluationSpec, OptimizerSpec, TrainSpec, WorkersSpec

_CLASSIFIERS = ("perceptron", "mlp", "lenet", "alexnet", "resnet")
_TRAINS = {
    "classification": _CLASSIFIERS,
    "regression": _CLASSIFIERS,
    "reconstruction": ("autoencoder",),
    "transport": ("conv-generator", "biggan"),
    "gan": ("conv-generator", "biggan"),
    "wasserstein": ("conv-generator", "biggan"),
    "learned-transport": ("conv-generator",),
    "flow": ("flow-unet",),
}


_LATER: tuple[tuple[str, type[Section], tuple[str, ...]], ...] = (
    ("data", DataSpec, ("characters",)),
    ("model", ConvGeneratorSpec, ("conditional",)),
    (
        "objective",
        TransportSpec,
        ("features", "self_term", "pool", "reals", "condition_weight", "components", "normalise"),
    ),
)
"""Fields added after the first checkpoints: at their defaults, they do not enter the fingerprint."""


def _differentiates_twice(objective: ObjectiveSpec) -> bool:
    match objective:
        case WassersteinSpec():
            return objective.constraint == "gradient-penalty"
        case LearnedTransportSpec():
            return objective.penalty > 0
    return False


def _couples_whole_batches(objective: ObjectiveSpec) -> bool:
    match objective:
        case TransportSpec() | LearnedTransportSpec():
            return True
        case FlowSpec():
            return isinstance(objective.coupling, BatchPlanSpec)
        case ClassificationSpec():
            return objective.mixes
    return False


def _name(model: str) -> str:
    return model.partition("@")[0].partition("/")[0]


class RegisterSpec(Section):
    """Name and alias under which the finished model is registered."""

    name: Name = Field(description="name of the registered model")
    alias: Name = Field(default="live", description="alias that points to the new version")


class JobSpec(Section):
    """Spec of a job. ``configs/`` has one for each network of the article."""

    name: Name = Field(description="name of the job: lower-case letters, digits and hyphens")
    seed: int = Field(default=0, ge=0, lt=2**31, description="seed of all random draws of the job")
    data: DataSpec = Field(description="source and preparation of the images")
    model: ModelSpec = Field(description="network to train")
    objective: ObjectiveSpec = Field(description="objective to minimise")
    optimizer: OptimizerSpec = Field(default=OptimizerSpec(), description="optimizer of the network")
    train: TrainSpec = Field(description="length, batches and intervals of the training")
    workers: WorkersSpec = Field(default=WorkersSpec(), description="number and devices of the workers")
    evaluation: EvaluationSpec = Field(default=EvaluationSpec(), description="evaluation of generators")
    register_as: RegisterSpec | None = Field(
        default=None, description="name and alias of the registered model; by default the job's name and alias live"
    )

    @model_validator(mode="after")
    def _check_sections(self) -> JobSpec:
        fitting = _TRAINS[self.objective.kind]
        if self.model.kind not in fitting:
            raise ValueError(
                f"objective {self.objective.kind!r} cannot train model {self.model.kind!r}; use {' or '.join(fitting)}"
            )
        if isinstance(self.objective, FlowSpec) and isinstance(self.objective.coupling, PoolPlanSpec):
            points = self.objective.coupling.points
            if points % self.train.batch:
                raise ValueError(
                    f"objective.coupling.points {points} is not a multiple of train.batch {self.train.batch}"
                )
        if isinstance(self.objective, FlowSpec) and isinstance(self.model, FlowUNetSpec):
            coupling = self.objective.coupling
            if getattr(coupling, "condition_weight", 0) and not self.model.conditional:
                raise ValueError("objective.coupling.condition_weight requires a conditional model")
        if isinstance(self.objective, TransportSpec):
            self._transport_fits(self.objective)
        if isinstance(self.objective, WassersteinSpec):
            free = self.objective.constraint == "none"
            if free != self.objective.critic.spectral:
                raise ValueError(
                    f"objective.constraint {self.objective.constraint!r} with critic.spectral "
                    f"{self.objective.critic.spectral}: exactly one of them must keep the critic Lipschitz; use "
                    "constraint none with spectral true, or another constraint with spectral false"
                )
        if isinstance(self.objective, LearnedTransportSpec) and getattr(self.model, "conditional", False):
            raise ValueError("objective 'learned-transport' cannot train a conditional model; use gan or wasserstein")
        if isinstance(self.objective, LearnedTransportSpec) and self.train.batch < 2 * self.workers.count:
            raise ValueError(
                f"train.batch {self.train.batch} leaves some of {self.workers.count} workers without images in one "
                "half of the batch; this objective compares the two halves"
            )
        if self.train.compile and _differentiates_twice(self.objective):
            raise ValueError("train.compile does not support the second derivatives that this penalty needs")
        if _couples_whole_batches(self.objective) and self.train.accumulate > 1:
            raise ValueError(
                f"train.accumulate {self.train.accumulate} would split the batches, which this objective needs whole"
            )
        couples = (
            isinstance(self.model, ResNetSpec | BigGanSpec) or getattr(self.model, "normalisation", None) == "batch"
        )
        if couples and self.train.accumulate > 1:
            raise ValueError(
                f"train.accumulate {self.train.accumulate} would split the batches over which this model normalises"
            )
        if not self.generates and self.evaluation.reference is not None:
            raise ValueError(
                f"evaluation.reference {self.evaluation.reference!r} is for generators; this job does not train one"
            )
        if not self.registers and self.register_as is not None:
            raise ValueError("register_as is for models that the endpoint can serve; it cannot serve a regression")
        if self.train.batch < self.workers.count:
            raise ValueError(
                f"train.batch {self.train.batch} leaves some of {self.workers.count} workers without images"
            )
        return self

    def _transport_fits(self, objective: TransportSpec) -> None:
        conditional = isinstance(self.model, BigGanSpec) or getattr(self.model, "conditional", False)
        if conditional and not objective.features:
            raise ValueError("objective 'transport' with a conditional model requires objective.features")
        if objective.condition_weight and not conditional:
            raise ValueError("objective.condition_weight requires a conditional model")
        if conditional and not objective.condition_weight:
            raise ValueError(
                "objective.condition_weight 0: plans would ignore the classes of a conditional model; use about 2"
            )
        if objective.self_term == "two-batch" and self.train.batch < 2 * self.workers.count:
            raise ValueError(
                f"train.batch {self.train.batch} leaves some of {self.workers.count} workers without samples in one "
                "half of the batch; objective.self_term two-batch compares the two halves"
            )
        if objective.pool is not None and objective.pool % self.train.batch:
            raise ValueError(f"objective.pool {objective.pool} is not a multiple of train.batch {self.train.batch}")
        if objective.pool is not None and objective.pool > self.train.images:
            raise ValueError(
                f"objective.pool {objective.pool} is larger than train.images {self.train.images}: the job would end "
                "before its second pool; use a smaller pool or more images"
            )
        if objective.self_term == "two-batch" and self.train.batch % 2 and (objective.pool or conditional):
            raise ValueError(
                f"train.batch {self.train.batch} is odd; objective.self_term two-batch needs two equal halves"
            )
        if objective.reals is not None and objective.reals < self.workers.count:
            raise ValueError(
                f"objective.reals {objective.reals} leaves some of {self.workers.count} workers without images"
            )
        judge = self.evaluation.reference
        for name in objective.networks:
            if judge is not None and _name(name) == _name(judge):
                raise ValueError(
                    f"evaluation.reference {judge!r} is also a network of objective.features: the evaluation must use "
                    "a network that the generator is not trained against; choose another one"
                )

    @property
    def generates(self) -> bool:
        """Whether the job trains a generator."""
        return not isinstance(self.objective, ClassificationSpec | RegressionSpec | ReconstructionSpec)

    @property
    def registers(self) -> bool:
        """Whether the finished model is registered: the endpoint serves classifiers and generators."""
        return not isinstance(self.objective, RegressionSpec)

    def outputs(self, classes: int) -> int:
        """How many outputs the network of this job has on data of so many classes, if it is no generator."""
        return 1 if isinstance(self.objective, RegressionSpec) else classes

    @property
    def registered(self) -> RegisterSpec:
        """Name and alias of the model that this job registers."""
        return self.register_as or RegisterSpec(name=self.name)

    def with_versions(self, version: Callable[[str], str]) -> JobSpec:
        """Replace references to registered models by fixed versions, so that later changes of aliases have no effect.

        Args:
            version: function that returns ``NAME/VERSION`` for any reference; called once per reference.
        """
        known = functools.cache(version)
        changes: dict[str, Section] = {}
        if self.evaluation.registered is not None:
            reference = known(self.evaluation.registered)
            changes["evaluation"] = self.evaluation.model_copy(update={"reference": reference})
        if isinstance(self.objective, TransportSpec) and self.objective.registered:
            registered = self.objective.registered
            features = tuple(
                one.model_copy(update={"network": known(one.network)}) if one.network in registered else one
                for one in self.objective.features
            )
            changes["objective"] = self.objective.model_copy(update={"features": features})
        return self.model_copy(update=changes) if changes else self

    def fingerprint(self) -> str:
        """sha256 of all fields that determine the result; a job resumes only from checkpoints of its fingerprint.

        The sections ``workers`` and ``evaluation`` are excluded: a job may resume on another number of workers and
        with another evaluation.
        """
        decisive = self.model_dump(mode="json", exclude={"workers", "name", "register_as", "evaluation"})
        for section, kind, names in _LATER:
            own = getattr(self, section)
            for name in names if isinstance(own, kind) else ():
                if getattr(own, name) == kind.model_fields[name].default:
                    del decisive[section][name]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def require_more(self, images: int) -> None:
        """Require that a run that continues from a checkpoint has images left to train on.

        Args:
            images: number of images seen by the checkpoint.

        Raises:
            SpecError: ``train.images`` is not larger than that number.
        """
        if self.train.images <= images:
            raise SpecError(
                f"train.images: {self.train.images}, but the checkpoint to continue from has already seen {images}",
                hint=f"raise train.images above {images}",
            )

    def to_yaml(self) -> str:
        """The resolved spec in YAML, including defaults."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
