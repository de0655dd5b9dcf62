"""Bundles in the model registry."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException

from pipelines.errors import CheckpointError, ModelNotFoundError, ServiceError
from pipelines.models.bundle import Bundle, to_uint8, truncated
from pipelines.models.network import Generator
from services.tracking.connection import connect
from services.tracking.names import split_name
from services.tracking.registry import download, list_models, register, resolve
from services.tracking.run import Run
from tests.services.tracking.stores import CLASSES, make_bundle, open_run


@pytest.fixture
def run(uri: str) -> Run:
    return open_run(uri)


def test_a_bundle_comes_back_as_it_was(run: Run, tmp_path: Path) -> None:
    bundle = make_bundle()
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 16, 16), dtype=np.uint8)
    path = list(sys.path)
    ref = register(run, bundle.save(tmp_path / "b"), "cats", examples=images, metrics={"accuracy": 0.9}, images=100)
    assert sys.path == path
    assert (ref.name, ref.version, ref.alias, ref.run_id) == ("cats", 1, "live", run.run_id)
    assert resolve(run.uri, "cats") == ref
    back = download(run.uri, ref, tmp_path / "cache")
    np.testing.assert_array_equal(back.predict(images), bundle.predict(images))
    assert (back.classes, back.image, back.spec) == (bundle.classes, bundle.image, bundle.spec)
    (metric,) = connect(run.uri).get_metric_history(run.run_id, "accuracy")
    assert (metric.value, metric.step) == (0.9, 100)
    run.close()


def test_the_model_card_says_what_it_is(run: Run, tmp_path: Path) -> None:
    register(run, make_bundle().save(tmp_path / "b"), "cats", metrics={"accuracy": 0.9, "gap": float("nan")})
    version = connect(run.uri).get_model_version("cats", "1")
    assert version.tags["monge.kind"] == "classifier"
    assert version.tags["monge.image"] == "1×16×16"
    assert version.tags["metric.accuracy"] == "0.9"
    assert "cat, dog, owl" in version.description
    assert "mlp" in version.description
    run.close()


def test_aliases_move_and_versions_stay(run: Run, tmp_path: Path) -> None:
    folders = [make_bundle(seed=seed).save(tmp_path / str(seed)) for seed in range(2)]
    first = register(run, folders[0], "cats")
    second = register(run, folders[1], "cats", "trial")
    assert resolve(run.uri, "cats@live").version == first.version == 1
    assert resolve(run.uri, "cats@trial").version == second.version == 2
    third = register(run, folders[1], "cats")
    assert resolve(run.uri, "cats").version == third.version == 3
    pinned = resolve(run.uri, "cats/1")
    assert (pinned.version, pinned.alias) == (1, None)
    (model,) = list_models(run.uri)
    assert (model.name, dict(model.aliases), model.latest) == ("cats", {"live": 3, "trial": 2}, 3)
    run.close()


def test_what_does_not_exist_is_answered_with_what_does(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError) as nothing:
        resolve(run.uri, "cats")
    assert "no model is registered" in str(nothing.value.hint)
    register(run, make_bundle().save(tmp_path / "b"), "cats")
    with pytest.raises(ModelNotFoundError) as other_name:
        resolve(run.uri, "dogs")
    assert "cats" in str(other_name.value.hint)
    for name in ("cats@trial", "cats/2"):
        with pytest.raises(ModelNotFoundError) as other_version:
            resolve(run.uri, name)
        assert "@live = 1" in str(other_version.value.hint)
    run.close()


@pytest.mark.parametrize("name", ["", "a b", "a@", "a/b", "a@b/1", "../a", "@live", "a/", "a@live/../b"])
def test_what_cannot_be_a_name_is_refused(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="is not a valid model reference"):
        split_name(name)


def test_names_have_three_forms() -> None:
    assert split_name("cats") == ("cats", "live", None)
    assert split_name("cats@trial") == ("cats", "trial", None)
    assert split_name("cats/12") == ("cats", None, 12)


def test_the_cache_serves_without_the_registry_and_heals(run: Run, tmp_path: Path) -> None:
    ref = register(run, make_bundle().save(tmp_path / "b"), "cats")
    download(run.uri, ref, tmp_path / "cache")
    away = "http://127.0.0.1:9"
    assert download(away, ref, tmp_path / "cache").classes == CLASSES
    (cached,) = (tmp_path / "cache").iterdir()
    (cached / "weights.safetensors").write_bytes(b"damaged")
    assert download(run.uri, ref, tmp_path / "cache").classes == CLASSES
    (cached / "weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(ServiceError, match="look up"):
        download(away, ref, tmp_path / "cache")
    run.close()


def test_a_damaged_upload_never_reaches_the_cache(run: Run, tmp_path: Path) -> None:
    ref = register(run, make_bundle().save(tmp_path / "b"), "cats")
    (weights,) = (tmp_path / "mlruns").rglob("weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError):
        download(run.uri, ref, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    run.close()


def test_a_folder_without_a_bundle_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        register(run, tmp_path / "nothing", "cats")
    assert list_models(run.uri) == []
    run.close()


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (2, 1, 8, 8)])
def test_examples_must_fit(run: Run, tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ServiceError, match="examples"):
        register(run, make_bundle().save(tmp_path / "b"), "cats", examples=np.zeros(shape, np.uint8))
    run.close()


def load_by_mlflow(run: Run, bundle: Bundle, folder: Path) -> Any:
    import mlflow

    register(run, bundle.save(folder), "cats")
    run.close()
    location = connect(run.uri).get_model_version_download_uri("cats", "1")
    assert not list(Path(location.removeprefix("file://")).rglob("*.pkl"))
    return mlflow.pyfunc.load_model(location)


def images_of(bundle: Bundle, latents: np.ndarray, labels: list[int] | None = None) -> np.ndarray:
    network = bundle.network
    assert isinstance(network, Generator)
    with torch.inference_mode():
        conditions = None if labels is None else network.asked(torch.tensor(labels))
        return to_uint8(network(torch.from_numpy(latents), conditions)).numpy()


@pytest.mark.parametrize("kind", ["classification", "reconstruction", "transport", "unconditional flow"])
def test_mlflow_loads_the_model_by_itself(run: Run, tmp_path: Path, kind: str) -> None:
    bundle = make_bundle(kind)
    loaded = load_by_mlflow(run, bundle, tmp_path / "b")
    example = loaded.input_example
    assert len(example) >= 2
    match bundle.kind:
        case "classifier":
            expected = bundle.predict(example)
        case "encoder":
            expected = bundle.embed(example)
            assert expected.shape == (len(example), 5)
        case "generator":
            expected = images_of(bundle, example)
    np.testing.assert_array_equal(loaded.predict(example), expected)


@pytest.mark.parametrize("kind", ["gan", "flow"])
def test_mlflow_asks_a_conditional_generator_for_classes(run: Run, tmp_path: Path, kind: str) -> None:
    bundle = make_bundle(kind)
    loaded = load_by_mlflow(run, bundle, tmp_path / "b")
    inputs = loaded.metadata.get_input_schema()
    assert (inputs.required_input_names(), inputs.optional_input_names()) == (["latents"], ["class"])
    example = loaded.input_example
    latents = np.array(example["latents"].tolist(), np.float32)
    assert list(example["class"]) == ["cat", 2]
    np.testing.assert_array_equal(loaded.predict(example), images_of(bundle, latents, [0, 2]))
    for names in (["owl", "dog"], [2, 1], [2.0, "dog"]):
        np.testing.assert_array_equal(
            loaded.predict(example.assign(**{"class": names})), images_of(bundle, latents, [2, 1])
        )
    choices = [images_of(bundle, latents, [label] * 2) for label in range(3)]
    for table in (example[["latents"]], example.assign(**{"class": [None, None]})):
        for row, image in enumerate(loaded.predict(table)):
            assert any((image == choice[row]).all() for choice in choices)
    one_of_two = loaded.predict(example.assign(**{"class": [None, 1]}))
    np.testing.assert_array_equal(one_of_two[1], choices[1][1])
    for wrong in ("cow", 3, -1, 0.5, "1", [1, 2]):
        with pytest.raises(MlflowException, match="classes are cat, dog, owl, or their indices from 0 to 2"):
            loaded.predict(example.assign(**{"class": [wrong, 0]}))


@pytest.mark.parametrize("kind", ["transport", "gan"])
def test_mlflow_truncates_latents_by_a_parameter(run: Run, tmp_path: Path, kind: str) -> None:
    bundle = make_bundle(kind)
    loaded = load_by_mlflow(run, bundle, tmp_path / "b")
    example = loaded.input_example
    given = np.array(example["latents"].tolist(), np.float32) if kind == "gan" else example
    within = truncated(torch.from_numpy(given), 0.5).numpy()
    expected = images_of(bundle, within, [0, 2] if kind == "gan" else None)
    np.testing.assert_array_equal(loaded.predict(example, params={"truncation": 0.5}), expected)
    np.testing.assert_array_equal(loaded.predict(example, params={"truncation": 0.0}), loaded.predict(example))
    with pytest.raises(MlflowException, match=r"truncation: received -1\.0, expected a number > 0"):
        loaded.predict(example, params={"truncation": -1.0})


def test_mlflow_serves_a_conditional_generator(run: Run, tmp_path: Path) -> None:
    from mlflow.pyfunc.scoring_server import init
    from starlette.testclient import TestClient

    bundle = make_bundle("gan")
    server = TestClient(init(load_by_mlflow(run, bundle, tmp_path / "b")))
    latents = np.random.default_rng(0).standard_normal((2, bundle.network.latent), dtype=np.float32)  # type: ignore[union-attr]
    rows = [{"latents": latent, "class": name} for latent, name in zip(latents.tolist(), ("owl", 1), strict=True)]
    answer = server.post("/invocations", json={"dataframe_records": rows})
    assert answer.status_code == 200, answer.text
    np.testing.assert_array_equal(answer.json()["predictions"], images_of(bundle, latents, [2, 1]))
    answer = server.post("/invocations", json={"dataframe_records": [{"latents": latents[0].tolist()}]})
    assert np.shape(answer.json()["predictions"]) == (1, 1, 16, 16)
    assert server.post("/invocations", json={"dataframe_records": [rows[0] | {"class": "cow"}]}).status_code == 400
