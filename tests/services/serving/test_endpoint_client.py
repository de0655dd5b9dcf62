"""The endpoint's client, over HTTP, against an endpoint under uvicorn."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from PIL import Image

from pipelines.errors import CorruptImageError, ModelNotFoundError, ServiceError, SourceError, SpecError
from services.serving.app import create_app
from services.serving.client import EndpointClient
from services.settings import Settings
from tests.services.serving.endpoints import encoded, publish
from tests.services.tracking.stores import CLASSES


@pytest.fixture
def client(uri: str, tmp_path: Path) -> Iterator[EndpointClient]:
    """A client of a classifier ``cats`` and a generator ``faces``."""
    publish(uri, tmp_path)
    publish(uri, tmp_path, "faces", "transport")
    publish(uri, tmp_path, "paths", "flow")
    app = create_app(Settings(home=tmp_path, mlflow_uri=uri), poll_seconds=1000)
    app.state.endpoint.store.poll()
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    with EndpointClient(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
        yield client
    server.should_exit = True
    thread.join(timeout=20)
    assert not thread.is_alive()


def files(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(encoded(number))
    return paths


def test_files_are_predicted_in_order_over_several_requests(client: EndpointClient, tmp_path: Path) -> None:
    paths = files(tmp_path, 70)
    together = client.predict("cats", paths)
    assert [prediction.path for prediction in together] == paths
    for number in (0, 65, 69):
        (alone,) = client.predict("cats@live", [paths[number]])
        assert alone.label == together[number].label
        assert alone.probability == pytest.approx(together[number].probability, abs=2e-6)
    assert together[0].label in CLASSES
    assert together[0].version == 1
    assert client.predict("cats/1", []) == []


def test_samples_are_written_to_a_file(client: EndpointClient, tmp_path: Path) -> None:
    out = client.generate("faces", 4, 0, tmp_path / "new" / "samples.png")
    assert min(Image.open(out).size) >= 32
    paths = client.path("paths", "cat", "dog", 5, 2, 0, tmp_path / "path.png")
    assert Image.open(paths).size[0] > 2 * Image.open(paths).size[1]
    alike = client.generate("faces", 4, 0, tmp_path / "alike.png", truncation=0.1)
    assert alike.read_bytes() != out.read_bytes()
    owls = client.generate("paths", 4, 0, tmp_path / "owls.png", label="owl")
    assert owls.read_bytes() != client.generate("paths", 4, 0, tmp_path / "all.png").read_bytes()
    assert [model["name"] for model in client.models()] == ["cats", "faces", "paths"]
    assert client.ready()["serving"] == {"cats@live": 1, "faces@live": 1, "paths@live": 1}


def test_what_is_wrong_is_typed(client: EndpointClient, tmp_path: Path) -> None:
    good, bad = files(tmp_path, 2)
    bad.write_bytes(b"not an image")
    with pytest.raises(CorruptImageError, match=r"1\.png: not a PNG"):
        client.predict("cats", [good, bad])
    with pytest.raises(SourceError, match=r"nothing\.png"):
        client.predict("cats", [tmp_path / "nothing.png"])
    with pytest.raises(ModelNotFoundError) as caught:
        client.predict("dogs", [good])
    assert "cats" in str(caught.value.hint)
    with pytest.raises(ModelNotFoundError, match="is not a valid model reference"):
        client.predict("../metrics", [good])
    with pytest.raises(SpecError, match="is a generator"):
        client.predict("faces", [good])
    with pytest.raises(SpecError, match="limit"):
        client.generate("faces", 10**6, 0, tmp_path / "samples.png")


def test_an_endpoint_that_is_away_says_so(tmp_path: Path) -> None:
    with EndpointClient("http://127.0.0.1:9") as client, pytest.raises(ServiceError, match="does not answer"):
        client.models()
