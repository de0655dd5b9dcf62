"""Model registry: trained bundles by name, version and alias.

For model references, see :mod:`services.tracking.names`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import pipelines
from pipelines.errors import CheckpointError, ModelNotFoundError, ServiceError
from pipelines.models.bundle import CARD, WEIGHTS, Bundle
from pipelines.models.network import Classifier, Encoder
from services.tracking.connection import connect, metric_name, mlflow_errors
from services.tracking.names import LIVE, split_name
from services.tracking.run import Run

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature
    from mlflow.tracking import MlflowClient

KIND_TAG = "monge.kind"

_SCRIPT = Path(__file__).with_name("served_model.py")
_REQUIREMENTS = ("mlflow", "torch", "numpy", "safetensors", "pydantic", "pyyaml")


@dataclass(frozen=True)
class ModelRef:
    """One version of a registered model.

    Attributes:
        name: name of the model.
        version: number of the version, from 1.
        alias: alias by which it was found; None if by version.
        run_id: id of the MLflow run that trained it.
    """

    name: str
    version: int
    alias: str | None
    run_id: str

    @property
    def by_version(self) -> str:
        """``NAME/VERSION``, which does not change when aliases move."""
        return f"{self.name}/{self.version}"

    def __str__(self) -> str:
        return self.by_version + (f" (@{self.alias})" if self.alias else "")


@dataclass(frozen=True)
class RegisteredModel:
    """A model in the registry.

    Attributes:
        name: name of the model.
        aliases: versions by alias.
        latest: newest version.
        description: description of the model in Markdown.
    """

    name: str
    aliases: Mapping[str, int]
    latest: int
    description: str


def register(
    run: Run,
    bundle_folder: str | Path,
    name: str,
    alias: str = LIVE,
    *,
    examples: np.ndarray | None = None,
    metrics: Mapping[str, float] | None = None,
    images: int = 0,
) -> ModelRef:
    """Store a bundle as the next version of a registered model and move an alias to it.

    MLflow can load the version by itself (``mlflow models serve``; see ``served_model.py`` for inputs and outputs): it
    contains its weights, its card and a copy of ``pipelines``. The alias moves last, so that clients that follow it
    never see an incomplete model.

    Args:
        run: run that trained the model.
        bundle_folder: folder of a saved :class:`~pipelines.models.bundle.Bundle`.
        name: name of the registered model, created if necessary.
        alias: alias to move to the new version.
        examples: (b, c, h, w) uint8 images, b ≥ 2, as the input example of a classifier or an encoder; blank images by
            default.
        metrics: final metrics for the model card.
        images: number of images seen: the step of the model in the run.

    Raises:
        CheckpointError: the folder contains no bundle.
        ServiceError: MLflow is unreachable or rejects the model.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric
    from mlflow.models import Model
    from mlflow.pyfunc import save_model

    folder = Path(bundle_folder)
    bundle = Bundle.load(folder)
    metrics = {metric_name(key): float(value) for key, value in (metrics or {}).items()}
    example = _example(bundle, examples)
    tags = _tags(bundle, metrics)
    client = connect(run.uri)
    with mlflow_errors(run.uri, f"register model {name!r}"), tempfile.TemporaryDirectory() as temporary:
        info = client.get_run(run.run_id).info
        # Not with mlflow.pyfunc.log_model: it uses process-wide state, loads the model again, and leaves its path in
        # sys.path.
        logged = client.create_logged_model(info.experiment_id, name=name, source_run_id=run.run_id, tags=tags)
        model = Model(run_id=run.run_id, model_id=logged.model_id, model_uuid=logged.model_id)
        path = Path(temporary, "model")
        save_model(
            path,
            mlflow_model=model,
            python_model=_SCRIPT,
            artifacts={"weights": str(folder / WEIGHTS), "card": str(folder / CARD)},
            code_paths=[str(Path(pipelines.__file__).parent)],
            signature=_signature(bundle),
            input_example=example,
            pip_requirements=[f"{package}=={installed(package).partition('+')[0]}" for package in _REQUIREMENTS],
        )
        client.log_model_artifacts(logged.model_id, str(path))
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
        client.log_outputs(run.run_id, [LoggedModelOutput(logged.model_id, step=images)])
        finite = {key: value for key, value in metrics.items() if np.isfinite(value)}
        now = info.start_time
        client.log_batch(
            run.run_id,
            [
                Metric(key, value, now, images, model_id=logged.model_id, run_id=run.run_id)
                for key, value in finite.items()
            ],
        )
        _create_name(client, name)
        version = client.create_model_version(
            name,
            source=logged.artifact_location,
            run_id=run.run_id,
            tags=tags,
            description=_card(bundle, metrics),
            model_id=logged.model_id,
        )
        client.set_registered_model_alias(name, alias, version.version)
    return ModelRef(name, int(version.version), alias, run.run_id)


def resolve(uri: str, model: str) -> ModelRef:
    """Return the current version for ``NAME``, ``NAME@ALIAS`` or ``NAME/VERSION``.

    Raises:
        ModelNotFoundError: not found; the hint lists what exists.
        ServiceError: MLflow is unreachable.
    """
    return _ref(*_find_version(uri, model))


def download(uri: str, ref: ModelRef, cache: str | Path) -> Bundle:
    """Return the bundle of a version, from the cache folder if it was downloaded before.

    Reads only weights and card; nothing from the registry is executed.

    Raises:
        ModelNotFoundError: the version no longer exists.
        CheckpointError: the stored files are not a bundle.
        ServiceError: MLflow is unreachable.
    """
    # A registry that was reset counts versions from 1 again: the run id distinguishes them.
    folder = Path(cache, f"{ref.name}-{ref.version}-{ref.run_id}")
    if folder.is_dir():
        try:
            return Bundle.load(folder)
        except CheckpointError:
            shutil.rmtree(folder, ignore_errors=True)
    from mlflow.artifacts import download_artifacts

    version, _ = _find_version(uri, f"{ref.name}/{ref.version}")
    if KIND_TAG not in version.tags:
        raise CheckpointError(f"model {ref} was not registered by Monge", hint="serve it with `mlflow models serve`")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        with mlflow_errors(uri, f"download {ref}"):
            location = connect(uri).get_model_version_download_uri(ref.name, str(ref.version))
            for file in (WEIGHTS, CARD):
                download_artifacts(
                    artifact_uri=f"{location}/artifacts/{file}", dst_path=temporary, tracking_uri=uri, registry_uri=uri
                )
        bundle = Bundle.load(temporary)
        # Atomic; if another process was first, it has the same files.
        complete = Path(tempfile.mkdtemp(dir=folder.parent))
        shutil.copytree(temporary, complete, dirs_exist_ok=True)
        try:
            complete.rename(folder)
        except OSError:
            shutil.rmtree(complete, ignore_errors=True)
    return bundle


def list_models(uri: str) -> list[RegisteredModel]:
    """Return all registered models, sorted by name.

    Raises:
        ServiceError: MLflow is unreachable.
    """
    client = connect(uri)
    with mlflow_errors(uri, "list its models"):
        models: list[Any] = []
        token = None
        while True:
            page = client.search_registered_models(max_results=100, order_by=["name ASC"], page_token=token)
            models += page
            token = page.token
            if not token:
                break
    return [
        RegisteredModel(
            model.name,
            {alias: int(version) for alias, version in (model.aliases or {}).items()},
            max((int(version.version) for version in model.latest_versions or ()), default=0),
            model.description or "",
        )
        for model in models
    ]


def _find_version(uri: str, model: str) -> tuple[ModelVersion, str | None]:
    from mlflow.exceptions import MlflowException

    name, alias, number = split_name(model)
    client = connect(uri)
    with mlflow_errors(uri, f"look up model {model!r}"):
        try:
            if number is not None:
                return client.get_model_version(name, str(number)), None
            assert alias is not None
            return client.get_model_version_by_alias(name, alias), alias
        except MlflowException as error:
            if error.get_http_status_code() not in (400, 404):
                raise
    reference = f"{name}@{alias}" if number is None else f"{name}/{number}"
    raise ModelNotFoundError(f"no model {reference!r} is registered", hint=_what_exists(uri, name))


def _what_exists(uri: str, name: str) -> str:
    models = list_models(uri)
    for model in models:
        if model.name == name:
            aliases = ", ".join(f"@{alias} = {version}" for alias, version in sorted(model.aliases.items()))
            return f"{name} has versions up to {model.latest} and " + (f"aliases {aliases}" if aliases else "no alias")
    names = ", ".join(model.name for model in models[:20])
    return f"registered models: {names}" if names else "no model is registered; `monge submit` trains and registers one"


def _ref(version: ModelVersion, alias: str | None) -> ModelRef:
    return ModelRef(version.name, int(version.version), alias, version.run_id or "")


def _create_name(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=f"Trained by Monge; versions under `{name}@ALIAS`.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _signature(bundle: Bundle) -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import AnyType, Array

    images = TensorSpec(np.dtype(np.uint8), (-1, *bundle.image.dims))
    if isinstance(bundle.network, Classifier | Encoder):
        numbers = bundle.network.code if isinstance(bundle.network, Encoder) else len(bundle.classes)
        answer = TensorSpec(np.dtype(np.float32), (-1, numbers))
        return ModelSignature(inputs=Schema([images]), outputs=Schema([answer]))
    truncation = ParamSchema([ParamSpec("truncation", DataType.double, 0.0)])
    if bundle.network.conditions:
        # A table, because MLflow has no optional tensors; double, because JSON numbers are not cast to float.
        columns: list[ColSpec | TensorSpec] = [
            ColSpec(Array(DataType.double), "latents"),
            ColSpec(AnyType(), "class", required=False),
        ]
        return ModelSignature(inputs=Schema(columns), outputs=Schema([images]), params=truncation)
    latents = TensorSpec(np.dtype(np.float32), (-1, bundle.network.latent))
    return ModelSignature(inputs=Schema([latents]), outputs=Schema([images]), params=truncation)


def _example(bundle: Bundle, images: np.ndarray | None) -> np.ndarray | pd.DataFrame:
    network = bundle.network
    if not isinstance(network, Classifier | Encoder):
        latents = np.random.default_rng(0).standard_normal((2, network.latent), dtype=np.float32)
        if not network.conditions:
            return latents
        import pandas as pd

        # One example by name, one by index.
        return pd.DataFrame({"latents": latents.tolist(), "class": [bundle.classes[0], len(bundle.classes) - 1]})
    if images is None:
        return np.zeros((2, *bundle.image.dims), np.uint8)
    if images.dtype != np.uint8 or images.shape[1:] != bundle.image.dims or len(images) < 2:
        raise ServiceError(
            f"examples: expected at least 2 uint8 images of {bundle.image.dims}, received {images.shape} {images.dtype}"
        )
    return images[:8]


def _tags(bundle: Bundle, metrics: Mapping[str, float]) -> dict[str, str]:
    tags = {
        KIND_TAG: bundle.kind,
        "monge.model": bundle.spec.kind,
        "monge.image": "×".join(str(n) for n in bundle.image.dims),
        "monge.classes": json.dumps(bundle.classes, ensure_ascii=False)[:5000],
    }
    return tags | {f"metric.{name}": f"{value:.6g}" for name, value in metrics.items()}


def _card(bundle: Bundle, metrics: Mapping[str, float]) -> str:
    channels, height, width = bundle.image.dims
    rows: list[tuple[str, Any]] = [
        ("network", f"{bundle.spec.kind}, {bundle.network.parameter_count:,} parameters"),
        ("images", f"{channels} × {height} × {width}"),
        ("classes", ", ".join(bundle.classes[:50]) + (", …" if len(bundle.classes) > 50 else "")),
        *((name, f"{value:.6g}") for name, value in metrics.items()),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"{bundle.kind.capitalize()}.\n\n| | |\n|---|---|\n{table}\n"
