"""The real processes: an MLflow server, ``mlflow models serve``, Ray Serve."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from pipelines.data.decode import decode
from services.settings import Settings
from services.tracking.connection import connect
from services.tracking.registry import download, resolve
from services.tracking.server import server_command, server_environment
from tests.services.serving.endpoints import PNG, encoded, endpoint, publish
from tests.services.tracking.stores import make_bundle

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def process(command: list[str], environment: dict[str, str], health: str, log: Path) -> Iterator[None]:
    """Run a process; yield when it is healthy, and stop it at the end."""
    with log.open("w") as file, subprocess.Popen(command, env=environment, stdout=file, stderr=file) as running:
        try:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                assert running.poll() is None, log.read_text()
                try:
                    if httpx.get(health, timeout=5).status_code == 200:
                        break
                except httpx.HTTPError:
                    time.sleep(0.1)
            else:
                raise AssertionError(f"{command} is not up after 120 s:\n{log.read_text()}")
            yield
        finally:
            running.terminate()
            running.wait(30)


def test_the_platforms_mlflow_server_feeds_the_endpoint_and_mlflow_serves_the_model(tmp_path: Path) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    command = server_command("127.0.0.1", port, f"sqlite:///{tmp_path}/store.db", tmp_path / "artifacts")
    image = decode(encoded(), 16, 1)
    with process(command, server_environment(), f"{uri}/health", tmp_path / "mlflow.log"):
        publish(uri, tmp_path)
        publish(uri, tmp_path, "faces", "transport")
        expected = download(uri, resolve(uri, "cats"), tmp_path / "cache").predict(image[None])
        np.testing.assert_array_equal(expected, make_bundle().predict(image[None]))

        async def scenario() -> None:
            async with endpoint(uri, tmp_path) as (client, _):
                answer = await client.post("/v1/models/cats/predict", content=encoded(), headers=PNG)
                rows = [list(p["probabilities"].values()) for p in answer.json()["predictions"]]
                np.testing.assert_allclose(rows, expected, atol=2e-6)

        asyncio.run(asyncio.wait_for(scenario(), 60))
        serving = free_port()
        serve = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "--model-uri"]
        serve += ["models:/cats@live", "--host", "127.0.0.1", "--port", str(serving), "--workers", "1"]
        # Away from this repository, the model has only what was stored with it.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"MLFLOW_TRACKING_URI": uri, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        with process(serve, environment, f"http://127.0.0.1:{serving}/ping", tmp_path / "serve.log"):
            answer = httpx.post(
                f"http://127.0.0.1:{serving}/invocations", json={"inputs": image[None].tolist()}, timeout=60
            )
        assert answer.status_code == 200, answer.text
        np.testing.assert_allclose(answer.json()["predictions"], expected, atol=1e-6)
        metrics = connect(uri).get_run(resolve(uri, "cats").run_id)
        assert metrics.info.status == "FINISHED"


def test_the_same_app_runs_under_ray_serve(uri: str, tmp_path: Path, ray_cluster: None) -> None:
    from ray import serve

    from services.serving.serve_on_ray import bind_app

    publish(uri, tmp_path)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(bind_app(Settings(home=tmp_path, mlflow_uri=uri), cpus=0.5), route_prefix="/")
        url = f"http://127.0.0.1:{port}"
        answer = httpx.post(f"{url}/v1/models/cats/predict", content=encoded(), headers=PNG, timeout=60)
        assert answer.status_code == 200, answer.text
        rows = [list(p["probabilities"].values()) for p in answer.json()["predictions"]]
        np.testing.assert_allclose(rows, make_bundle().predict(decode(encoded(), 16, 1)[None]), atol=2e-6)
        publish(uri, tmp_path, seed=1)
        deadline = time.monotonic() + 60
        while httpx.get(f"{url}/ready", timeout=60).json()["serving"] != {"cats@live": 2}:
            assert time.monotonic() < deadline, json.dumps(httpx.get(f"{url}/ready").json())
            time.sleep(0.1)
    finally:
        serve.shutdown()
