"""Client of the model endpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from pipelines.errors import CorruptImageError, MongeError, ServiceError, SourceError
from services.error_documents import read_error
from services.tokens import authorization
from services.tracking.names import split_name

_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
_IMAGES_A_REQUEST = 64
_BYTES_A_REQUEST = 2**24


@dataclass(frozen=True)
class Prediction:
    """Scores of one image.

    Attributes:
        path: path of the image.
        label: most probable class.
        probability: probability of that class.
        probabilities: probability of each class.
        version: version of the model.
    """

    path: Path
    label: str
    probability: float
    probabilities: Mapping[str, float]
    version: int


class EndpointClient:
    """Client of the models behind an endpoint.

    Args:
        url: URL of the endpoint, ``http://host:port``.
        timeout: timeout of a request in seconds.
        transport: httpx transport, for an endpoint in this process.
        secret: token for an endpoint that is not on loopback: ``settings.secret``.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 60.0,
        transport: httpx.BaseTransport | None = None,
        *,
        secret: str | None = None,
    ) -> None:
        self.url = url
        self._http = httpx.Client(base_url=url, headers=authorization(secret), timeout=timeout, transport=transport)

    def __enter__(self) -> EndpointClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def predict(self, model: str, paths: Sequence[str | Path]) -> list[Prediction]:
        """Return class probabilities of image files, in their order.

        Args:
            model: ``NAME``, ``NAME@ALIAS`` or ``NAME/VERSION``.
            paths: PNG, JPEG or WebP files.

        Raises:
            ModelNotFoundError: the model is not registered.
            SourceError: a file cannot be read.
            CorruptImageError: the endpoint cannot decode a file.
            SpecError: the model is not a classifier.
            TooLargeError: a file exceeds the endpoint's limit on requests.
            BusyError: the queue of the endpoint is full.
            ServiceError: the endpoint is unreachable or failed.
        """
        predictions: list[Prediction] = []
        for batch in _batches([Path(path) for path in paths]):
            files = [("images", (path.name, data, _TYPES.get(path.suffix.lower()))) for path, data in batch]
            answer = self._call("POST", f"{_address(model)}/predict", [path for path, _ in batch], files=files).json()
            predictions += [
                Prediction(path, row["class"], row["probability"], row["probabilities"], answer["version"])
                for (path, _), row in zip(batch, answer["predictions"], strict=True)
            ]
        return predictions

    def generate(
        self,
        model: str,
        count: int,
        seed: int,
        out: str | Path,
        label: str | None = None,
        truncation: float | None = None,
    ) -> Path:
        """Write samples of a generator to ``out`` as one PNG image.

        Args:
            model: ``NAME``, ``NAME@ALIAS`` or ``NAME/VERSION``.
            count: number of samples.
            seed: the same seed gives the same samples.
            out: PNG file; its folder is created if necessary.
            label: class to sample from a conditional model.
            truncation: maximum absolute latent coordinate; lower values give more typical, less varied samples.

        Raises:
            ModelNotFoundError: the model is not registered.
            SpecError: the model is not a generator, or a value is invalid for it.
            BusyError: too many requests are waiting.
            ServiceError: the endpoint is unreachable or failed.
        """
        wanted = {"count": count, "seed": seed, "label": label, "truncation": truncation, "format": "png"}
        return self._picture(f"{_address(model)}/generate", wanted, out)

    def path(
        self,
        model: str,
        start: str,
        end: str,
        steps: int,
        count: int,
        seed: int,
        out: str | Path,
        truncation: float | None = None,
    ) -> Path:
        """Interpolate between two classes and write the images to ``out`` as one PNG image.

        Args:
            model: ``NAME``, ``NAME@ALIAS`` or ``NAME/VERSION``, of a conditional generator.
            start, end: names of the classes.
            steps: number of images per path, including both ends.
            count: number of paths, one per row.
            seed: the same seed gives the same paths.
            out: PNG file; its folder is created if necessary.
            truncation: see :meth:`generate`.

        Raises:
            ModelNotFoundError: the model is not registered.
            SpecError: the model is not a generator, or a value is invalid for it.
            BusyError: too many requests are waiting.
            ServiceError: the endpoint is unreachable or failed.
        """
        wanted = {"start": start, "end": end, "steps": steps, "count": count, "seed": seed, "format": "png"}
        wanted["truncation"] = truncation
        return self._picture(f"{_address(model)}/path", wanted, out)

    def _picture(self, route: str, wanted: dict[str, Any], out: str | Path) -> Path:
        picture = self._call("POST", route, json=wanted).content
        out = Path(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(picture)
        return out

    def models(self) -> list[dict[str, Any]]:
        """Return all registered models: name, aliases, latest version, served versions.

        Raises:
            ServiceError: the endpoint is unreachable.
        """
        return list(self._call("GET", "/v1/models").json()["models"])

    def ready(self) -> dict[str, Any]:
        """The endpoint's own account of what it serves and what fails.

        Raises:
            ServiceError: the endpoint is away.
        """
        return dict(self._call("GET", "/ready", accept=(200, 503)).json())

    def _call(
        self, method: str, path: str, files_sent: Sequence[Path] = (), accept: Sequence[int] = (200,), **body: Any
    ) -> httpx.Response:
        try:
            response = self._http.request(method, path, **body)
        except httpx.HTTPError as error:
            raise ServiceError(
                f"the endpoint at {self.url} does not answer: {error or type(error).__name__}",
                hint="run `monge up`, or set MONGE_ENDPOINT_URL",
            ) from error
        if response.status_code not in accept:
            raise _error(response, files_sent)
        return response


def _address(model: str) -> str:
    name, alias, version = split_name(model)
    return f"/v1/models/{name}/versions/{version}" if version is not None else f"/v1/models/{name}@{alias}"


def _batches(paths: list[Path]) -> Iterator[list[tuple[Path, bytes]]]:
    """Files in requests of a moderate size, each read when it is its turn."""
    batch: list[tuple[Path, bytes]] = []
    size = 0
    for path in paths:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
        if batch and (len(batch) == _IMAGES_A_REQUEST or size + len(data) > _BYTES_A_REQUEST):
            yield batch
            batch, size = [], 0
        batch.append((path, data))
        size += len(data)
    if batch:
        yield batch


def _error(response: httpx.Response, files: Sequence[Path]) -> MongeError:
    error = read_error(response.content, response.status_code, "the endpoint")
    if isinstance(error, CorruptImageError):
        match = re.fullmatch(r"images\[(\d+)\]: (.*)", str(error.args[0]), re.DOTALL)
        if match and int(match[1]) < len(files):
            return CorruptImageError(f"{files[int(match[1])]}: {match[2]}", hint=error.hint)
    return error
