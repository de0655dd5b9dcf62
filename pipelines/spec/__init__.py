"""The job spec: everything that decides a run, in one frozen, checked document.

Durations are in images seen and batches are global, so that neither depends on how many workers run the job.
"""

from pipelines.spec.data import DataSpec
from pipelines.spec.job import JobSpec, RegisterSpec
from pipelines.spec.models import (
    AlexNetSpec,
    BigGanSpec,
    ConvGeneratorSpec,
    CriticSpec,
    FlowUNetSpec,
    GeneratorSpec,
    LeNetSpec,
    MLPSpec,
    ModelSpec,
    PerceptronSpec,
    ResNetSpec,
)
from pipelines.spec.objectives import (
    BatchPlanSpec,
    ClassificationSpec,
    CostName,
    CouplingSpec,
    ExactDistanceSpec,
    FlowSpec,
    GanSpec,
    IndependentSpec,
    LearnedTransportSpec,
    ObjectiveSpec,
    PoolPlanSpec,
    RecordedSpec,
    RegressionSpec,
    SinkhornDistanceSpec,
    SlicedDistanceSpec,
    TransportSpec,
    WassersteinSpec,
)
from pipelines.spec.reading import json_schema, load_spec, parse_data, parse_spec
from pipelines.spec.training import EvaluationSpec, ImageNetName, OptimizerSpec, TrainSpec, WorkersSpec

__all__ = [
    "AlexNetSpec",
    "BatchPlanSpec",
    "BigGanSpec",
    "ClassificationSpec",
    "ConvGeneratorSpec",
    "CostName",
    "CouplingSpec",
    "CriticSpec",
    "DataSpec",
    "EvaluationSpec",
    "ExactDistanceSpec",
    "FlowSpec",
    "FlowUNetSpec",
    "GanSpec",
    "GeneratorSpec",
    "ImageNetName",
    "IndependentSpec",
    "JobSpec",
    "LeNetSpec",
    "LearnedTransportSpec",
    "MLPSpec",
    "ModelSpec",
    "ObjectiveSpec",
    "OptimizerSpec",
    "PerceptronSpec",
    "PoolPlanSpec",
    "RecordedSpec",
    "RegisterSpec",
    "RegressionSpec",
    "ResNetSpec",
    "SinkhornDistanceSpec",
    "SlicedDistanceSpec",
    "TrainSpec",
    "TransportSpec",
    "WassersteinSpec",
    "WorkersSpec",
    "json_schema",
    "load_spec",
    "parse_data",
    "parse_spec",
]
