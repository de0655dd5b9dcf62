"""The model endpoint in this process, with a registry in a file."""

import asyncio
import base64
import io
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from pipelines.data.decode import decode
from pipelines.errors import ServiceError
from services.serving import models as models_module
from services.serving.app import GENERATE_QUEUE, Endpoint, create_app
from services.settings import Settings
from services.tracking.connection import connect
from tests.services.serving.endpoints import PNG, encoded, endpoint, publish
from tests.services.tracking.stores import CLASSES, make_bundle

Client = httpx.AsyncClient
Scenario = Callable[[Client, Endpoint], Coroutine[Any, Any, None]]


@pytest.fixture
def cats(uri: str, tmp_path: Path) -> str:
    """A registry with one classifier."""
    publish(uri, tmp_path)
    return uri


@pytest.fixture
def faces(uri: str, tmp_path: Path) -> str:
    """A registry with one generator."""
    publish(uri, tmp_path, "faces", "transport")
    return uri


def play(uri: str, scenario: Scenario, **options: float) -> None:
    """Run a scenario against an endpoint."""

    async def run() -> None:
        async with endpoint(uri, Path("home"), **options) as (client, shared):
            await scenario(client, shared)

    asyncio.run(asyncio.wait_for(run(), 60))


def expected(images: np.ndarray, seed: int = 0) -> np.ndarray:
    return make_bundle(seed=seed).predict(images)


def rows(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    return np.array([list(p["probabilities"].values()) for p in response.json()["predictions"]])


def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    document = response.json()
    assert document.keys() >= {"error", "message", "hint", "request_id"}
    return dict(document)


def test_predict_takes_images_in_every_form(cats: str) -> None:
    images = np.random.default_rng(1).integers(0, 256, (2, 1, 16, 16), dtype=np.uint8)
    buffers = [io.BytesIO() for _ in images]
    for image, buffer in zip(images, buffers, strict=True):
        Image.fromarray(image[0]).save(buffer, "PNG")
    pngs = [buffer.getvalue() for buffer in buffers]

    async def scenario(client: Client, shared: Endpoint) -> None:
        url = "/v1/models/cats/predict"
        as_form = await client.post(url, files=[("images", (f"{i}.png", png)) for i, png in enumerate(pngs)])
        as_lists = await client.post(url, json={"images": images.tolist()})
        as_base64 = await client.post(url, json={"images": base64.b64encode(images.tobytes()).decode()})
        for response in (as_form, as_lists, as_base64):
            np.testing.assert_allclose(rows(response), expected(images), atol=2e-6)
        one = await client.post(url, content=pngs[0], headers=PNG)
        np.testing.assert_allclose(rows(one), expected(images[:1]), atol=2e-6)
        answer = one.json()
        assert (answer["model"], answer["version"]) == ("cats", 1)
        best = CLASSES[expected(images[:1]).argmax()]
        assert answer["predictions"][0]["class"] == best
        assert answer["predictions"][0]["probability"] == answer["predictions"][0]["probabilities"][best]

    play(cats, scenario)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_images_are_fitted_as_in_training(cats: str, form: str) -> None:
    data = encoded(side=50, form=form)

    async def scenario(client: Client, shared: Endpoint) -> None:
        answer = await client.post(
            "/v1/models/cats/predict", content=data, headers={"content-type": f"image/{form.lower()}"}
        )
        np.testing.assert_allclose(rows(answer), expected(decode(data, 16, 1)[None]), atol=2e-6)

    play(cats, scenario)


def test_bodies_large_enough_for_a_thread_are_the_same(cats: str) -> None:
    images = np.random.default_rng(1).integers(0, 256, (256, 1, 16, 16), dtype=np.uint8)

    async def scenario(client: Client, shared: Endpoint) -> None:
        answer = await client.post("/v1/models/cats/predict", json={"images": images.tolist()})
        np.testing.assert_allclose(rows(answer), expected(images), atol=2e-6)

    play(cats, scenario)


@pytest.mark.parametrize("model", ["cats@trial", "cats/versions/2"])
def test_other_aliases_and_versions_are_loaded_when_asked_for(cats: str, tmp_path: Path, model: str) -> None:
    publish(cats, tmp_path, seed=1, alias="trial")

    async def scenario(client: Client, shared: Endpoint) -> None:
        answer = await client.post(f"/v1/models/{model}/predict", content=encoded(), headers=PNG)
        assert answer.json()["version"] == 2
        np.testing.assert_allclose(rows(answer), expected(decode(encoded(), 16, 1)[None], seed=1), atol=2e-6)
        live = await client.post("/v1/models/cats/predict", content=encoded(), headers=PNG)
        assert live.json()["version"] == 1

    play(cats, scenario)


def test_generate_makes_a_picture_or_a_tensor(faces: str) -> None:
    async def scenario(client: Client, shared: Endpoint) -> None:
        url = "/v1/models/faces/generate"
        picture = await client.post(url, json={"count": 4, "seed": 3})
        assert picture.headers["content-type"] == "image/png"
        assert picture.headers["x-monge-model"] == "faces/1"
        assert min(Image.open(io.BytesIO(picture.content)).size) >= 32
        samples = make_bundle("transport").generate(4, 3)
        by_format = await client.post(url, json={"count": 4, "seed": 3, "format": "json"})
        by_header = await client.post(url, json={"count": 4, "seed": 3}, headers={"accept": "application/json"})
        for answer in (by_format, by_header):
            document = answer.json()
            raw = np.frombuffer(base64.b64decode(document["images"]), np.uint8).reshape(document["shape"])
            assert np.abs(raw.astype(int) - samples).max() <= 1
        again = await client.post(url, json={"count": 4, "seed": 3})
        assert again.content == picture.content
        pinned = await client.post("/v1/models/faces/versions/1/generate", json={"count": 4, "seed": 3})
        assert pinned.content == picture.content

    play(faces, scenario)


@pytest.fixture
def paths(uri: str, tmp_path: Path) -> str:
    """A registry with one conditional generator, and one that is not."""
    publish(uri, tmp_path, "paths", "flow")
    publish(uri, tmp_path, "faces", "transport")
    return uri


def test_a_class_is_asked_for_by_name(paths: str) -> None:
    async def scenario(client: Client, shared: Endpoint) -> None:
        url = "/v1/models/paths/generate"
        answer = await client.post(url, json={"count": 2, "seed": 3, "label": "owl", "format": "json"})
        raw = np.frombuffer(base64.b64decode(answer.json()["images"]), np.uint8).reshape(2, 1, 16, 16)
        assert np.abs(raw.astype(int) - make_bundle("flow").generate(2, 3, label=2)).max() <= 1
        refused = problem(await client.post(url, json={"label": "cow"}), 422)
        assert (refused["field"], refused["hint"]) == ("label", "use one of cat, dog, owl")
        refused = problem(await client.post("/v1/models/faces/generate", json={"label": "cat"}), 422)
        assert "is not conditional" in refused["message"]
        assert (await client.get("/v1/models/paths")).json()["conditional"] is True
        assert (await client.get("/v1/models/faces")).json()["conditional"] is False

    play(paths, scenario)


def test_a_path_is_a_row_of_the_picture(paths: str) -> None:
    wanted = {"start": "cat", "end": "owl", "steps": 5, "count": 2, "seed": 1}

    async def scenario(client: Client, shared: Endpoint) -> None:
        picture = await client.post("/v1/models/paths/path", json=wanted)
        width, height = Image.open(io.BytesIO(picture.content)).size
        assert (width - 1) / 5 == (height - 1) / 2
        pinned = await client.post("/v1/models/paths/versions/1/path", json=wanted | {"format": "json"})
        document = pinned.json()
        assert document["shape"] == [10, 1, 16, 16]
        raw = np.frombuffer(base64.b64decode(document["images"]), np.uint8).reshape(document["shape"])
        assert np.abs(raw.astype(int) - make_bundle("flow").path(0, 2, 5, 2, 1)).max() <= 1

    play(paths, scenario)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"start": "cow"}, "start"),
        ({"end": "cow"}, "end"),
        ({"steps": 1}, "steps"),
        ({"steps": 1025}, "count"),
        ({"count": 0}, "count"),
    ],
)
def test_path_names_the_wrong_field(paths: str, body: dict[str, Any], field: str) -> None:
    async def scenario(client: Client, shared: Endpoint) -> None:
        wanted = {"start": "cat", "end": "dog"} | body
        assert problem(await client.post("/v1/models/paths/path", json=wanted), 422)["field"] == field
        assert "is not conditional" in problem(await client.post("/v1/models/faces/path", json=wanted), 422)[
            "message"
        ] or (field in ("steps", "count"))

    play(paths, scenario)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"count": 0}, "count"),
        ({"count": 1025}, "count"),
        ({"count": "many"}, "count"),
        ({"seed": -1}, "seed"),
        ({"truncation": 0}, "truncation"),
        ({"truncation": "nan"}, "truncation"),
        ({"format": "gif"}, "format"),
        ({"sed": 1}, "sed"),
    ],
)
def test_generate_names_the_wrong_field(faces: str, body: dict[str, Any], field: str) -> None:
    async def scenario(client: Client, shared: Endpoint) -> None:
        assert problem(await client.post("/v1/models/faces/generate", json=body), 422)["field"] == field

    play(faces, scenario)


def test_a_full_queue_is_429_with_the_time_to_come_back(faces: str) -> None:
    async def scenario(client: Client, shared: Endpoint) -> None:
        shared.generating = GENERATE_QUEUE
        answer = await client.post("/v1/models/faces/generate", json={})
        assert problem(answer, 429)["error"] == "BusyError"
        assert answer.headers["retry-after"] == "1"
        counted = 'monge_endpoint_requests_total{model="faces",route="generate",status="429"} 1.0'
        assert counted in (await client.get("/metrics")).text

    play(faces, scenario)


def test_generate_is_limited_in_pixels(faces: str) -> None:
    async def scenario(client: Client, shared: Endpoint) -> None:
        answer = problem(await client.post("/v1/models/faces/generate", json={"count": 5}), 422)
        assert "at most 4" in answer["hint"]

    play(faces, scenario, max_image_pixels=4 * 256)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{", "body"),
        (b"[" * 100_000, "body"),
        (b"[]", "images"),
        (b"{}", "images"),
        (b'{"images": []}', "images"),
        (b'{"images": 3}', "images"),
        (b'{"images": "?"}', "images"),
        (b'{"images": "AAAA"}', "images"),
        (b'{"images": ""}', "images"),
        (b'{"images": [[1], [1, 2]]}', "images"),
        (b'{"images": [[[[1.5]]]]}', "images"),
        (b'{"images": [[[[NaN]]]]}', "images"),
        (b'{"images": [[[["a"]]]]}', "images"),
        (b'{"images": [[[[' + b"9" * 30 + b"]]]]}", "images"),
    ],
)
def test_tensors_that_are_none_are_refused(cats: str, body: bytes, field: str) -> None:
    async def scenario(client: Client, shared: Endpoint) -> None:
        answer = await client.post(
            "/v1/models/cats/predict", content=body, headers={"content-type": "application/json"}
        )
        assert problem(answer, 422)["field"] == field

    play(cats, scenario)


def test_tensors_out_of_range_or_of_another_shape_are_refused(cats: str) -> None:
    async def scenario(client: Client, shared: Endpoint) -> None:
        for images in (np.full((1, 1, 16, 16), 256), np.full((1, 1, 16, 16), -1), np.zeros((1, 3, 16, 16), int)):
            answer = await client.post("/v1/models/cats/predict", json={"images": images.tolist()})
            assert problem(answer, 422)["field"] == "images"

    play(cats, scenario)


def test_images_that_are_none_are_refused_by_number(cats: str) -> None:
    async def scenario(client: Client, shared: Endpoint) -> None:
        url = "/v1/models/cats/predict"
        files = [("images", ("a.png", encoded())), ("images", ("b.png", b"not an image"))]
        assert problem(await client.post(url, files=files), 422)["field"] == "images[1]"
        assert problem(await client.post(url, content=b"", headers=PNG), 422)["field"] == "images[0]"
        assert problem(await client.post(url, content=encoded()[:60], headers=PNG), 422)["field"] == "images[0]"
        many = [("images", (f"{i}.png", b"x")) for i in range(257)]
        assert problem(await client.post(url, files=many), 422)["field"] == "images"
        form = {"content-type": "multipart/form-data; boundary=a"}
        assert problem(await client.post(url, content=b"not a form", headers=form), 422)["field"] == "body"
        for bare in ("multipart/form-data", "multipart/form-data; boundary="):
            problem(await client.post(url, content=b"--a", headers={"content-type": bare}), 422)

    play(cats, scenario)


def test_other_content_types_are_refused(cats: str) -> None:
    async def scenario(client: Client, shared: Endpoint) -> None:
        for headers in ({"content-type": "image/gif"}, {"content-type": "text/plain; charset=x"}, {}):
            answer = await client.post("/v1/models/cats/predict", content=b"GIF89a", headers=headers)
            assert problem(answer, 415)["field"] == "content-type"

    play(cats, scenario)


def test_large_requests_are_refused_before_they_are_read(cats: str) -> None:
    read = 0

    async def endless() -> Any:
        nonlocal read
        while True:
            read += 1
            yield b"\0" * 1024

    async def scenario(client: Client, shared: Endpoint) -> None:
        url = "/v1/models/cats/predict"
        problem(await client.post(url, content=endless(), headers=PNG), 413)
        assert read <= 12
        problem(await client.post(url, content=b"\0" * 20_000, headers=PNG), 413)
        problem(await client.post("/v1/models/cats/generate", content=b"\0" * 20_000), 413)

    play(cats, scenario, max_request_mib=10 / 1024)


def test_large_images_are_refused_before_they_are_decoded(cats: str) -> None:
    async def scenario(client: Client, shared: Endpoint) -> None:
        answer = await client.post("/v1/models/cats/predict", content=encoded(side=40), headers=PNG)
        assert "pixels" in problem(answer, 422)["message"]

    play(cats, scenario, max_image_pixels=1000)


def test_unknown_models_are_answered_with_the_known(cats: str) -> None:
    async def scenario(client: Client, shared: Endpoint) -> None:
        for model in ("dogs", "cats@trial", "cats/versions/9", "a%20b"):
            answer = await client.post(f"/v1/models/{model}/predict", content=encoded(), headers=PNG)
            assert problem(answer, 404)["hint"]
        assert "cats" in (await client.get("/v1/models/dogs")).json()["hint"]
        problem(await client.get("/nowhere"), 404)

    play(cats, scenario)


def test_the_wrong_kind_of_model_says_which_route_is_right(uri: str, tmp_path: Path) -> None:
    publish(uri, tmp_path)
    publish(uri, tmp_path, "faces", "transport")
    publish(uri, tmp_path, "codes", "reconstruction")

    async def scenario(client: Client, shared: Endpoint) -> None:
        answer = await client.post("/v1/models/faces/predict", content=encoded(), headers=PNG)
        assert "/generate" in problem(answer, 422)["hint"]
        assert "/predict" in problem(await client.post("/v1/models/cats/generate", json={}), 422)["hint"]
        for route, content in (("predict", {"content": encoded(), "headers": PNG}), ("generate", {"json": {}})):
            answer = await client.post(f"/v1/models/codes/{route}", **content)  # type: ignore[arg-type]
            told = problem(answer, 422)
            assert "'codes' is an encoder" in told["message"]
            assert "objective.features" in told["hint"]
        assert (await client.get("/v1/models/codes")).json()["kind"] == "encoder"

    play(uri, scenario)


def test_models_are_listed_and_described(uri: str, tmp_path: Path) -> None:
    publish(uri, tmp_path)
    publish(uri, tmp_path, "faces", "transport")

    async def scenario(client: Client, shared: Endpoint) -> None:
        listed = (await client.get("/v1/models")).json()["models"]
        assert [model["name"] for model in listed] == ["cats", "faces"]
        assert listed[0] == {"name": "cats", "aliases": {"live": 1}, "latest": 1, "serving": {"live": 1}}
        card = (await client.get("/v1/models/cats")).json()
        assert card["classes"] == list(CLASSES)
        assert card["image"] == {"channels": 1, "height": 16, "width": 16}
        assert card["kind"] == "classifier"
        assert (await client.get("/health")).json() == {"status": "live"}
        paths = (await client.get("/openapi.json")).json()["paths"]
        assert "example" in str(paths["/v1/models/{name}/predict"])

    play(uri, scenario)


def test_the_endpoint_follows_the_alias_without_a_restart(cats: str, tmp_path: Path) -> None:
    async def scenario(client: Client, shared: Endpoint) -> None:
        url = "/v1/models/cats/predict"
        assert (await client.post(url, content=encoded(), headers=PNG)).json()["version"] == 1
        await asyncio.to_thread(publish, cats, tmp_path, "cats", "classification", 1)
        answer = await client.post(url, content=encoded(), headers=PNG)
        async with asyncio.timeout(30):
            while answer.json()["version"] == 1:
                np.testing.assert_allclose(rows(answer), expected(decode(encoded(), 16, 1)[None]), atol=2e-6)
                answer = await client.post(url, content=encoded(), headers=PNG)
        np.testing.assert_allclose(rows(answer), expected(decode(encoded(), 16, 1)[None], seed=1), atol=2e-6)
        assert 'monge_endpoint_model_version{alias="live",model="cats"} 2.0' in (await client.get("/metrics")).text

    play(cats, scenario, poll_seconds=0.02)


def test_an_alias_that_moves_back_is_followed_too(cats: str, tmp_path: Path) -> None:
    publish(cats, tmp_path, seed=1)

    async def scenario(client: Client, shared: Endpoint) -> None:
        connect(cats).set_registered_model_alias("cats", "live", "1")
        shared.store.poll()
        answer = await client.post("/v1/models/cats/predict", content=encoded(), headers=PNG)
        assert answer.json()["version"] == 1
        connect(cats).delete_registered_model_alias("cats", "live")
        shared.store.poll()
        problem(await client.post("/v1/models/cats/predict", content=encoded(), headers=PNG), 404)

    play(cats, scenario)


def test_no_request_fails_while_the_version_changes(cats: str, tmp_path: Path) -> None:
    async def scenario(client: Client, shared: Endpoint) -> None:
        swap = asyncio.create_task(asyncio.to_thread(lambda: (publish(cats, tmp_path, seed=1), shared.store.poll())))
        versions = []
        while not swap.done():
            answers = await asyncio.gather(
                *(client.post("/v1/models/cats/predict", content=encoded(), headers=PNG) for _ in range(8))
            )
            assert {answer.status_code for answer in answers} == {200}
            versions += [answer.json()["version"] for answer in answers]
        await swap
        versions.append(
            (await client.post("/v1/models/cats/predict", content=encoded(), headers=PNG)).json()["version"]
        )
        assert versions[0] == 1
        assert versions[-1] == 2

    play(cats, scenario)


def test_a_version_that_cannot_be_loaded_leaves_the_old_one_and_is_reported(cats: str, tmp_path: Path) -> None:
    async def scenario(client: Client, shared: Endpoint) -> None:
        publish(cats, tmp_path, seed=1)
        newest = max((tmp_path / "mlruns").rglob("weights.safetensors"), key=lambda file: file.stat().st_mtime)
        whole = newest.read_bytes()
        newest.write_bytes(whole[:50])
        shared.store.poll()
        answer = await client.post("/v1/models/cats/predict", content=encoded(), headers=PNG)
        assert answer.json()["version"] == 1
        ready = await client.get("/ready")
        assert ready.status_code == 200
        assert "version 2" in ready.json()["failing"]["cats@live"]
        assert 'monge_endpoint_load_failures_total{model="cats"} 1.0' in (await client.get("/metrics")).text
        newest.write_bytes(whole)
        shared.store.poll()  # too soon: a version that fails is tried ever more rarely
        assert shared.store.failures
        for failure in shared.store._failures.values():
            failure.not_before = 0.0
        shared.store.poll()
        assert not shared.store.failures
        answer = await client.post("/v1/models/cats/predict", content=encoded(), headers=PNG)
        assert answer.json()["version"] == 2

    play(cats, scenario)


def test_what_is_loaded_is_served_while_the_registry_is_away(cats: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise ServiceError("MLflow does not answer")

    async def scenario(client: Client, shared: Endpoint) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(models_module, "list_models", away)
            patch.setattr(models_module, "resolve", away)
            shared.store.poll()
            answer = await client.post("/v1/models/cats/predict", content=encoded(), headers=PNG)
            assert answer.json()["version"] == 1
            ready = await client.get("/ready")
            assert ready.status_code == 200
            assert ready.json()["registry"] == {"up": False, "error": "MLflow does not answer"}
            assert "monge_endpoint_registry_up 0.0" in (await client.get("/metrics")).text
            problem(await client.post("/v1/models/dogs/predict", content=encoded(), headers=PNG), 503)
        shared.store.poll()
        assert (await client.get("/ready")).json()["registry"]["up"] is True

    play(cats, scenario)


def test_foreign_pages_are_refused_on_loopback_alone(tmp_path: Path) -> None:
    async def scenario(client: Client, shared: Endpoint) -> None:
        for headers in ({"Host": "evil.example:8000"}, {"Origin": "https://evil.example"}):
            assert problem(await client.get("/v1/models", headers=headers), 403)["error"] == "ForbiddenError"
            elsewhere = create_app(Settings(home=tmp_path, mlflow_uri="http://127.0.0.1:9"), loopback=False)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(elsewhere), base_url="http://models") as other:
                assert (await other.get("/v1/models", headers=headers)).status_code == 200
        assert (await client.get("/v1/models", headers={"Origin": "http://localhost:3000"})).status_code == 200

    play("http://127.0.0.1:9", scenario)


def test_an_endpoint_that_never_reached_its_registry_is_not_ready(tmp_path: Path) -> None:
    async def scenario(client: Client, shared: Endpoint) -> None:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 503

    play("http://127.0.0.1:9", scenario)


def test_concurrent_requests_share_batches_and_get_their_own_answers(cats: str) -> None:
    async def scenario(client: Client, shared: Endpoint) -> None:
        sizes: list[int] = []
        shared.batcher._on_batch = sizes.append
        bodies = [encoded(seed) for seed in range(96)]
        answers = await asyncio.gather(
            *(client.post("/v1/models/cats/predict", content=body, headers=PNG) for body in bodies)
        )
        alone = expected(np.stack([decode(body, 16, 1) for body in bodies]))
        np.testing.assert_allclose(np.concatenate([rows(answer) for answer in answers]), alone, atol=2e-6)
        assert sum(sizes) == 96
        assert max(sizes) > 1

    play(cats, scenario)


def test_the_event_loop_is_free_while_a_batch_is_computed(cats: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(client: Client, shared: Endpoint) -> None:
        enough = threading.Event()

        def slow(model: models_module.LoadedModel, images: np.ndarray) -> np.ndarray:
            assert enough.wait(60), "nothing is answered while a batch is computed"
            return np.full((len(images), len(CLASSES)), 1 / len(CLASSES), np.float32)

        monkeypatch.setattr(models_module.LoadedModel, "predict", slow)
        request = asyncio.create_task(client.post("/v1/models/cats/predict", content=encoded(), headers=PNG))
        for _ in range(20):
            assert (await client.get("/health")).status_code == 200
            await asyncio.sleep(0)  # a call within the process need not give way by itself
            assert not request.done()
        enough.set()
        assert (await request).status_code == 200

    play(cats, scenario)
