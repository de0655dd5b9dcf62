"""From a spec to an objective."""

from __future__ import annotations

from pipelines.errors import SpecError
from pipelines.models.network import Classifier, Generator
from pipelines.objectives.classification import Classification
from pipelines.objectives.phase import Objective
from pipelines.objectives.transport import TransportObjective
from pipelines.spec import ClassificationSpec, ObjectiveSpec, TransportSpec
from pipelines.transport.planner import Planner


def build_objective(spec: ObjectiveSpec, network: Classifier | Generator, planner: Planner) -> Objective:
    """The objective that a spec describes, over a network that is already on its device.

    Args:
        spec: which objective.
        network: the network that the job trains.
        planner: who solves transport plans, for the objectives that need them.

    Raises:
        SpecError: the network is not of the kind that the objective trains.
    """
    match spec, network:
        case ClassificationSpec(), Classifier():
            return Classification(spec, network)
        case TransportSpec(), Generator():
            return TransportObjective(spec, network, planner)
    raise SpecError(f"objective {spec.kind!r} cannot train a {type(network).__name__}")
