"""One job: all sections together."""

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
"""Fields that sections got after there were checkpoints: a spec that leaves them out keeps its fingerprint."""


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
    """The name and alias under which the finished model is registered."""

    name: Name
    alias: Name = "live"


class JobSpec(Section):
    """One job. See ``configs/`` for one spec for each network of the article."""

    name: Name
    seed: int = Field(default=0, ge=0, lt=2**31)
    data: DataSpec
    model: ModelSpec
    objective: ObjectiveSpec
    optimizer: OptimizerSpec = OptimizerSpec()
    train: TrainSpec
    workers: WorkersSpec = WorkersSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    register_as: RegisterSpec | None = Field(default=None, description="by default the job's name, alias live")

    @model_validator(mode="after")
    def _belong_together(self) -> JobSpec:
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
                raise ValueError("objective.coupling.condition_weight is for a model that is conditional")
        if isinstance(self.objective, TransportSpec):
            self._transport_fits(self.objective)
        if isinstance(self.objective, WassersteinSpec):
            free = self.objective.constraint == "none"
            if free != self.objective.critic.spectral:
                raise ValueError(
                    f"objective.constraint {self.objective.constraint!r} with critic.spectral "
                    f"{self.objective.critic.spectral}: one thing keeps a critic Lipschitz; use constraint none with "
                    "spectral true, or another one with spectral false"
                )
        if isinstance(self.objective, LearnedTransportSpec) and getattr(self.model, "conditional", False):
            raise ValueError("objective 'learned-transport' trains no conditional model; use gan or wasserstein")
        if isinstance(self.objective, LearnedTransportSpec) and self.train.batch < 2 * self.workers.count:
            raise ValueError(
                f"train.batch {self.train.batch} leaves some of {self.workers.count} workers without images in both "
                "of its halves, between which this objective compares"
            )
        if self.train.compile and _differentiates_twice(self.objective):
            raise ValueError("train.compile cannot translate the gradient of a gradient, which this penalty is")
        if _couples_whole_batches(self.objective) and self.train.accumulate > 1:
            raise ValueError(
                f"train.accumulate {self.train.accumulate} would cut the batches that this objective couples as wholes"
            )
        couples = (
            isinstance(self.model, ResNetSpec | BigGanSpec) or getattr(self.model, "normalisation", None) == "batch"
        )
        if couples and self.train.accumulate > 1:
            raise ValueError(
                f"train.accumulate {self.train.accumulate} would cut the batches over which this model normalises"
            )
        if not self.generates and self.evaluation.reference is not None:
            raise ValueError(
                f"evaluation.reference {self.evaluation.reference!r} judges generators; this job trains none"
            )
        if not self.registers and self.register_as is not None:
            raise ValueError("register_as is for models that the endpoint can serve; a regression has no classes")
        if self.train.batch < self.workers.count:
            raise ValueError(
                f"train.batch {self.train.batch} leaves some of {self.workers.count} workers without images"
            )
        return self

    def _transport_fits(self, objective: TransportSpec) -> None:
        conditional = isinstance(self.model, BigGanSpec) or getattr(self.model, "conditional", False)
        if conditional and not objective.features:
            raise ValueError("a conditional model is trained in features alone; give objective.features")
        if objective.condition_weight and not conditional:
            raise ValueError("objective.condition_weight is for a model that is conditional")
        if conditional and not objective.condition_weight:
            raise ValueError(
                "objective.condition_weight 0 leaves the classes of a conditional model out of the plans; give about 2"
            )
        if objective.self_term == "two-batch" and self.train.batch < 2 * self.workers.count:
            raise ValueError(
                f"train.batch {self.train.batch} leaves some of {self.workers.count} workers without samples in both "
                "of its halves, which objective.self_term two-batch compares"
            )
        if objective.pool is not None and objective.pool % self.train.batch:
            raise ValueError(f"objective.pool {objective.pool} is not a multiple of train.batch {self.train.batch}")
        if objective.pool is not None and objective.pool > self.train.images:
            raise ValueError(
                f"objective.pool {objective.pool} is larger than train.images {self.train.images}: the job would end "
                "before a second pool; train on many pools"
            )
        if objective.self_term == "two-batch" and self.train.batch % 2 and (objective.pool or conditional):
            raise ValueError(
                f"train.batch {self.train.batch} is odd, while objective.self_term two-batch needs two equal halves"
            )
        if objective.reals is not None and objective.reals < self.workers.count:
            raise ValueError(
                f"objective.reals {objective.reals} leaves some of {self.workers.count} workers without images"
            )
        judge = self.evaluation.reference
        for name in objective.networks:
            if judge is not None and _name(name) == _name(judge):
                raise ValueError(
                    f"evaluation.reference {judge!r} is a network of objective.features: a generator is not judged by "
                    "what it is trained to please; name another one"
                )

    @property
    def generates(self) -> bool:
        """Whether the job trains a generator."""
        return not isinstance(self.objective, ClassificationSpec | RegressionSpec | ReconstructionSpec)

    @property
    def registers(self) -> bool:
        """Whether the finished model is registered: what the endpoint answers with are classes or images."""
        return not isinstance(self.objective, RegressionSpec)

    def outputs(self, classes: int) -> int:
        """How many outputs the network of this job has on data of so many classes, if it is no generator."""
        return 1 if isinstance(self.objective, RegressionSpec) else classes

    @property
    def registered(self) -> RegisterSpec:
        """Name and alias of the model that this job registers."""
        return self.register_as or RegisterSpec(name=self.name)

    def with_versions(self, version: Callable[[str], str]) -> JobSpec:
        """The spec with the registered models that it uses by their versions, whatever their aliases do later.

        Args:
            version: ``NAME/VERSION`` of a model named in any way; asked once for each.
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
        """sha256 over all that decides the result: a checkpoint of another fingerprint cannot be resumed.

        The number of workers is left out: a job may resume on more or fewer, and be judged in another way.
        """
        decisive = self.model_dump(mode="json", exclude={"workers", "name", "register_as", "evaluation"})
        for section, kind, names in _LATER:
            own = getattr(self, section)
            for name in names if isinstance(own, kind) else ():
                if getattr(own, name) == kind.model_fields[name].default:
                    del decisive[section][name]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def require_more(self, images: int) -> None:
        """Refuse to go on from a checkpoint after which nothing is left to train.

        Args:
            images: that the checkpoint has seen.

        Raises:
            SpecError: they are all that the job would see.
        """
        if self.train.images <= images:
            raise SpecError(
                f"train.images: {self.train.images}, while the checkpoint to go on from has seen {images}",
                hint=f"raise train.images above {images}",
            )

    def to_yaml(self) -> str:
        """The resolved spec, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
