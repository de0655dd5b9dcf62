"""Models served by an endpoint; follows the aliases in the registry without a restart.

A new version is loaded next to the old one and replaces it in one assignment. Running requests keep their version.
Failures of the registry, of a download or of a bundle do not affect served models.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pipelines.data.decode import decode
from pipelines.errors import CorruptImageError, MongeError, ServiceError
from pipelines.models.bundle import Bundle
from services.serving.metrics import EndpointMetrics
from services.tracking.names import LIVE, split_name
from services.tracking.registry import ModelRef, RegisteredModel, download, list_models, resolve

PINNED = 16
"""Number of versions to keep that were requested by number and have no alias."""

CPU = torch.device("cpu")

log = logging.getLogger(__name__)


def device_of(asked: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Return the device for a setting.

    Raises:
        ServiceError: a GPU is requested but not available.
    """
    found = torch.cuda.is_available()
    if asked == "cuda" and not found:
        raise ServiceError(
            "MONGE_SERVING_DEVICE: cuda requested, but PyTorch finds no GPU",
            hint="set it to auto or cpu, or check `monge doctor`",
        )
    return torch.device("cuda" if found and asked != "cpu" else "cpu")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A loaded version. Predictions of concurrent requests share batches (``batching.Predictor``).

    Attributes:
        ref: reference to the version.
        bundle: network and card of the version.
        max_image_pixels: maximum size of an encoded image in pixels.
    """

    ref: ModelRef
    bundle: Bundle
    max_image_pixels: int

    def decode(self, images: Sequence[bytes] | np.ndarray) -> np.ndarray:
        """Decode images as in training, to (k, c, h, w) uint8.

        Raises:
            CorruptImageError: an image cannot be decoded; the message gives its index.
        """
        if isinstance(images, np.ndarray):
            return images
        shape = self.bundle.image
        pixels = np.empty((len(images), *shape.dims), np.uint8)
        for place, data in enumerate(images):
            try:
                pixels[place] = decode(data, shape.height, shape.channels, max_pixels=self.max_image_pixels)
            except CorruptImageError as error:
                raise CorruptImageError(f"images[{place}]: {error}") from None
        return pixels

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Return class probabilities; see :meth:`Bundle.predict`."""
        return self.bundle.predict(images)

    def warm_up(self) -> None:
        """Run one forward pass, to avoid a slow first request, and to never serve a network that fails."""
        blank = np.zeros((1, *self.bundle.image.dims), np.uint8)
        match self.bundle.kind:
            case "classifier":
                self.bundle.predict(blank)
            case "encoder":
                self.bundle.embed(blank)
            case "generator":
                self.bundle.generate(1, seed=0)


@dataclass
class _Failure:
    version: int
    message: str
    attempts: int = 0
    not_before: float = 0.0


@dataclass(frozen=True)
class _Table:
    """The served models, replaced as a whole: readers need no lock."""

    registered: Mapping[str, RegisteredModel] = field(default_factory=dict)
    by_alias: Mapping[tuple[str, str], LoadedModel] = field(default_factory=dict)


class ModelStore:
    """Loaded models by name and alias or version. All methods except :meth:`find` block; call them in worker threads.

    Args:
        uri: URI of the registry.
        cache: folder for downloaded bundles.
        max_image_pixels: maximum size of an encoded image in pixels.
        metrics: metrics of served versions and failures.
        device: device of the networks.
    """

    def __init__(
        self, uri: str, cache: Path, max_image_pixels: int, metrics: EndpointMetrics, device: torch.device = CPU
    ) -> None:
        self.uri = uri
        self.device = device
        self._cache, self._max_image_pixels, self._metrics = cache, max_image_pixels, metrics
        self._table = _Table()
        self._pinned: OrderedDict[tuple[str, int], LoadedModel] = OrderedDict()
        self._failures: dict[tuple[str, str], _Failure] = {}
        self._loading = threading.Lock()
        self.polled = False
        """Whether the registry has responded once, and its models were loaded as far as possible."""
        self.registry_error: str | None = None
        """Error of the last poll of the registry; None if it succeeded."""

    @property
    def registered(self) -> Mapping[str, RegisteredModel]:
        """Models in the registry at the last poll, by name."""
        return self._table.registered

    @property
    def served(self) -> list[tuple[str, LoadedModel]]:
        """Return the alias and the model of each followed alias."""
        return [(alias, model) for (_, alias), model in sorted(self._table.by_alias.items(), key=lambda item: item[0])]

    @property
    def failures(self) -> dict[str, str]:
        """Return the aliases whose newest version cannot be loaded, with the reason."""
        return {f"{name}@{alias}": failure.message for (name, alias), failure in self._failures.items()}

    def find(self, model: str) -> LoadedModel | None:
        """Return a loaded model by ``NAME``, ``NAME@ALIAS`` or ``NAME/VERSION``, or None if not loaded. Never blocks.

        Raises:
            ModelNotFoundError: the name is invalid.
        """
        name, alias, version = split_name(model)
        if version is None:
            return self._table.by_alias.get((name, alias or LIVE))
        return self._by_version(name, version)

    def load(self, model: str) -> LoadedModel:
        """Load a model that :meth:`find` did not find; an alias is then followed.

        Raises:
            ModelNotFoundError: the model is not registered; the hint lists the registered models.
            ServiceError: the registry is unreachable.
            CheckpointError: the stored bundle cannot be loaded.
        """
        with self._loading:
            found = self.find(model)  # another request may have loaded it
            if found is not None:
                return found
            ref = resolve(self.uri, model)
            loaded = self._by_version(ref.name, ref.version) or self._download(ref)
            if ref.alias is not None:
                self._publish({**self._table.by_alias, (ref.name, ref.alias): loaded}, self._table.registered)
            else:
                self._pinned[ref.name, ref.version] = loaded
                while len(self._pinned) > PINNED:
                    self._pinned.popitem(last=False)
            return loaded

    def poll(self) -> None:
        """Poll the registry and update each ``live`` alias and all other requested aliases.

        Raises nothing: failures are kept in ``registry_error`` and ``failures`` for ``/ready`` and the metrics.
        """
        try:
            registered = {model.name: model for model in list_models(self.uri)}
        except ServiceError as error:
            if self.registry_error is None:
                log.warning("registry unreachable, serving loaded models: %s", error)
            self.registry_error = str(error)
            self._metrics.registry_up.set(0)
            return
        self.registry_error = None
        self._metrics.registry_up.set(1)
        with self._loading:
            followed = {*self._table.by_alias, *((name, LIVE) for name in registered)}
            wanted = {
                (name, alias): registered[name].aliases[alias]
                for name, alias in followed
                if name in registered and alias in registered[name].aliases
            }
            by_alias = {
                key: model for key, version in wanted.items() if (model := self._follow(key, version)) is not None
            }
            self._failures = {key: failure for key, failure in self._failures.items() if key in wanted}
            self._publish(by_alias, registered)
        self.polled = True

    def _follow(self, key: tuple[str, str], version: int) -> LoadedModel | None:
        """Return the model to serve under an alias: its current version, or the previous one if that fails."""
        name, alias = key
        current = self._table.by_alias.get(key)
        if current is not None and current.ref.version == version:
            self._failures.pop(key, None)
            return current
        failure = self._failures.get(key)
        if failure is not None and failure.version == version and time.monotonic() < failure.not_before:
            return current
        try:
            ref = resolve(self.uri, f"{name}@{alias}")
            loaded = self._by_version(name, ref.version) or self._download(ref)
        except Exception as error:  # on any error, keep the old version
            if failure is None or failure.version != version:
                failure = self._failures[key] = _Failure(version, "")
                log.warning("%s@%s: version %d cannot be loaded: %s", name, alias, version, error)
            failure.message = f"version {version}: {error if isinstance(error, MongeError) else repr(error)}"
            failure.attempts += 1
            failure.not_before = time.monotonic() + min(2.0**failure.attempts, 60.0)
            self._metrics.load_failures.labels(name).inc()
            return current
        self._failures.pop(key, None)
        if current is not None:
            log.info("%s@%s: version %d replaces %d", name, alias, version, current.ref.version)
        return loaded

    def _by_version(self, name: str, version: int) -> LoadedModel | None:
        models = [*self._table.by_alias.values(), *self._pinned.values()]
        return next((model for model in models if (model.ref.name, model.ref.version) == (name, version)), None)

    def _download(self, ref: ModelRef) -> LoadedModel:
        bundle = download(self.uri, ref, self._cache)
        bundle.network.to(self.device)
        model = LoadedModel(ref, bundle, self._max_image_pixels)
        model.warm_up()
        return model

    def _publish(
        self, by_alias: Mapping[tuple[str, str], LoadedModel], registered: Mapping[str, RegisteredModel]
    ) -> None:
        self._table = _Table(registered, by_alias)
        self._metrics.model_version.clear()
        for (name, alias), model in by_alias.items():
            self._metrics.model_version.labels(name, alias).set(model.ref.version)
