"""The job spec: everything that decides a run, in one frozen, checked document.

Durations are in images seen and batches are global, so that neither depends on how many workers run the job.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipelines.errors import SpecError

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
CostName = Literal["squared-euclidean", "euclidean", "power", "cosine"]
Images = Annotated[int, Field(ge=1, description="a duration, in images seen by the whole job")]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSpec(_Section):
    """Where the images come from and how they are prepared."""

    source: str = Field(
        min_length=1,
        description="a catalogue name (cats-and-dogs, fashion-mnist, digits), a folder with one folder of PNG or JPEG "
        "files for each class, or an .npz file with arrays `images` and `labels`",
    )
    size: int | None = Field(
        default=None,
        ge=4,
        le=1024,
        description="side of the square images, in pixels; the source's own by default",
    )
    channels: Literal[1, 3] = Field(default=1, description="1 for grey, 3 for colour")
    test_fraction: float = Field(default=0.2, gt=0, lt=1, description="share of each class held out, split by content")
    max_bad_fraction: float = Field(
        default=0.1, ge=0, lt=1, description="share of unreadable images above which the job refuses to start"
    )


class PerceptronSpec(_Section):
    """One linear layer (Rosenblatt 1958)."""

    kind: Literal["perceptron"]


class MLPSpec(_Section):
    """Fully connected ReLU layers."""

    kind: Literal["mlp"]
    hidden: tuple[Annotated[int, Field(ge=1, le=65536)], ...] = Field(
        default=(256,),
        min_length=1,
        description="width of each hidden layer; one width makes the two-layer network",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1)


class LeNetSpec(_Section):
    """LeNet-5 (LeCun et al. 1998) with ReLU, max pooling and dropout."""

    kind: Literal["lenet"]
    dropout: float = Field(default=0.5, ge=0, lt=1)


class ConvGeneratorSpec(_Section):
    """A convolutional generator: a latent vector is unfolded to a small map, then upsampled (Radford et al. 2016)."""

    kind: Literal["conv-generator"]
    latent: int = Field(default=64, ge=1, le=4096, description="dimension of the latent vector")
    width: int = Field(default=32, ge=4, le=512, description="channels of the last hidden layer")


class FlowUNetSpec(_Section):
    """A U-Net that gives the velocity of a flow from noise to images (Lipman et al. 2023)."""

    kind: Literal["flow-unet"]
    width: int = Field(default=64, ge=8, le=512, multiple_of=8, description="channels at the first resolution")
    steps: int = Field(default=8, ge=1, le=1000, description="Euler steps from noise to image when it is served")


ModelSpec = Annotated[
    PerceptronSpec | MLPSpec | LeNetSpec | ConvGeneratorSpec | FlowUNetSpec, Field(discriminator="kind")
]
GeneratorSpec = ConvGeneratorSpec | FlowUNetSpec


class ClassificationSpec(_Section):
    """Least squares or cross-entropy between predicted probabilities and labels."""

    kind: Literal["classification"]
    loss: Literal["cross-entropy", "least-squares"] = "cross-entropy"
    flip: bool = Field(default=False, description="mirror half of the training images left to right")


class TransportSpec(_Section):
    """A generator that minimises the cost of the optimal plan between its samples and real images."""

    kind: Literal["transport"]
    cost: CostName = "squared-euclidean"
    power: float = Field(default=2.0, gt=0, le=16, description="the exponent p of cost `power`, ‖x − y‖ᵖ")
    plans: Literal["service", "local"] = Field(
        default="service", description="who solves the plans: the transport service, or each rank for itself"
    )


class IndependentSpec(_Section):
    """Fresh noise for each image."""

    kind: Literal["independent"]


class BatchPlanSpec(_Section):
    """The optimal plan between noise and images of each global batch."""

    kind: Literal["batch"]


class PoolPlanSpec(_Section):
    """Optimal plans between pools much larger than a batch, solved ahead of the training."""

    kind: Literal["pool"]
    points: int = Field(
        default=4096, ge=1, le=65536, description="of noise and of images in a pool; a multiple of train.batch"
    )


class RecordedSpec(_Section):
    """Pairs that `monge couple` solved for the whole data set."""

    kind: Literal["recorded"]
    file: str = Field(min_length=1, description="what `monge couple` wrote")


CouplingSpec = Annotated[IndependentSpec | BatchPlanSpec | PoolPlanSpec | RecordedSpec, Field(discriminator="kind")]


class FlowSpec(_Section):
    """Flow matching: a velocity field that carries noise to images along coupled pairs."""

    kind: Literal["flow"]
    coupling: CouplingSpec = PoolPlanSpec(kind="pool")
    plans: Literal["service", "local"] = Field(
        default="service", description="who solves the plans: the transport service, or each rank for itself"
    )


ObjectiveSpec = Annotated[ClassificationSpec | TransportSpec | FlowSpec, Field(discriminator="kind")]


_TRAINS = {
    "classification": ("perceptron", "mlp", "lenet"),
    "transport": ("conv-generator",),
    "flow": ("flow-unet",),
}


class OptimizerSpec(_Section):
    """How weights follow gradients."""

    kind: Literal["adam", "sgd"] = "adam"
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled from the gradient for adam (AdamW)")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of sgd; adam's first moment")
    schedule: Literal["constant", "cosine"] = Field(
        default="constant", description="cosine: the rate falls to zero over the run"
    )


class TrainSpec(_Section):
    """How long and in what steps."""

    images: Images = Field(description="images seen before the run ends")
    batch: int = Field(default=128, ge=1, description="global batch: images in one step over all workers")
    ema_half_life: int | None = Field(
        default=None, ge=1, description="images after which the moving average has forgotten half of a weight"
    )
    log_every: Images = Field(default=2_000, description="images between two points of a curve")
    evaluate_every: Images = Field(default=20_000, description="images between two evaluations on the held-out split")
    checkpoint_every: Images = Field(default=20_000, description="images between two checkpoints")


class WorkersSpec(_Section):
    """What the job runs on."""

    count: int = Field(default=2, ge=1, le=4096, description="distributed workers")
    device: Literal["auto", "cpu", "gpu"] = Field(default="auto", description="auto: GPUs when the cluster has enough")
    max_failures: int = Field(default=3, ge=0, description="worker failures after which the job gives up")


class RegisterSpec(_Section):
    """The name and alias under which the finished model is registered."""

    name: Name
    alias: Name = "live"


class JobSpec(_Section):
    """One job. See ``configs/`` for one spec for each network of the article."""

    name: Name
    seed: int = Field(default=0, ge=0, lt=2**31)
    data: DataSpec
    model: ModelSpec
    objective: ObjectiveSpec
    optimizer: OptimizerSpec = OptimizerSpec()
    train: TrainSpec
    workers: WorkersSpec = WorkersSpec()
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
        if self.train.batch < self.workers.count:
            raise ValueError(
                f"train.batch {self.train.batch} leaves some of {self.workers.count} workers without images"
            )
        return self

    @property
    def registered(self) -> RegisterSpec:
        """Name and alias of the model that this job registers."""
        return self.register_as or RegisterSpec(name=self.name)

    def fingerprint(self) -> str:
        """sha256 over all that decides the result: a checkpoint of another fingerprint cannot be resumed.

        The number of workers is left out: a job may resume on more or fewer.
        """
        decisive = self.model_dump(mode="json", exclude={"workers", "name", "register_as"})
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The resolved spec, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_spec(path: str | Path, overrides: Iterable[str] = ()) -> JobSpec:
    """Read a spec from YAML.

    Args:
        path: the file.
        overrides: ``dotted.path=value`` assignments, values in YAML, as in ``train.images=20000``.

    Raises:
        SpecError: naming the path of the field, the value received and what would do.
    """
    path = Path(path)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file", cure="see configs/ for specs to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of a date such as 2024-13-01
        raise SpecError(f"{path}: not YAML: {error}") from None
    if not isinstance(document, dict):
        raise SpecError(f"{path}: a mapping with name, data, model, objective and train expected")
    for override in overrides:
        _assign(document, override)
    return parse_spec(document, where=str(path))


def parse_spec(document: dict[str, Any], where: str = "spec") -> JobSpec:
    """Check a document against the job spec.

    Raises:
        SpecError: one line for each fault.
    """
    try:
        return JobSpec.model_validate(document)
    except ValidationError as error:
        raise SpecError(f"{where} is not a job spec:\n" + "\n".join(_fault(e) for e in error.errors())) from None


def json_schema() -> str:
    """The JSON schema of a job spec, for editors."""
    return json.dumps(JobSpec.model_json_schema(), indent=2) + "\n"


def _assign(document: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise SpecError(
            f"--set {override!r}: not an assignment", cure="write dotted.path=value, as in train.images=20000"
        )
    *parents, last = keys
    for key in parents:
        document = document.setdefault(key, {})
        if not isinstance(document, dict):
            raise SpecError(f"--set {override!r}: {key} is a value, not a section")
    try:
        document[last] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError(f"--set {override!r}: the value is not YAML: {error}") from None


def _fault(error: Any) -> str:
    location = list(error["loc"])
    # Pydantic puts the chosen member of a union behind the field's name; the reader's file does not have it.
    for field in ("coupling", "objective", "model"):
        if field in location[:-1]:
            del location[location.index(field) + 1]
    path = ".".join(str(part) for part in location) or "spec"
    message = error["msg"].removeprefix("Value error, ")
    received = error.get("input")
    if error["type"] == "union_tag_invalid":
        context = error["ctx"]
        return f"  {path}.kind: one of {context['expected_tags']} expected (received {context['tag']!r})"
    if error["type"] == "union_tag_not_found":
        return f"  {path}.kind: missing"
    if error["type"] == "extra_forbidden":
        return f"  {path}: no such field (received {received!r})"
    if error["type"] == "missing":
        return f"  {path}: missing"
    if isinstance(received, dict | BaseModel):
        return f"  {path}: {message}"
    return f"  {path}: {message} (received {received!r})"
