"""Script that MLflow stores next to a registered model and runs to load it ("models from code"; no pickle).

It has no other dependencies: MLflow runs it by path, with the copy of ``pipelines`` stored with the model.

A classifier takes images, (b, c, h, w) uint8, and returns class probabilities, (b, classes) float32. An encoder takes
the same and returns codes, (b, code) float32. A generator takes latent vectors, (b, latent) float32, drawn from the
standard normal distribution by the caller, and returns images, (b, c, h, w) uint8: the output is a function of the
input.

A conditional generator takes a table with one row per image: column ``latents`` holds the latent vectors, and column
``class`` the class by name or index. If that column or an entry of it is absent, the class is drawn at random.

A generator takes the parameter ``truncation``: latent vectors are then mapped into [−truncation, truncation], see
:func:`pipelines.models.bundle.truncated`; 0 leaves them unchanged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel

from pipelines.models.bundle import Bundle, to_uint8, truncated
from pipelines.models.network import Classifier, Encoder


class ServedModel(PythonModel):
    """A :class:`~pipelines.models.bundle.Bundle` behind MLflow's ``predict``."""

    def load_context(self, context: Any) -> None:
        """Read weights and card from the model's artifacts."""
        self.bundle = Bundle.load(Path(context.artifacts["weights"]).parent)

    def predict(
        self, context: Any, model_input: np.ndarray | pd.DataFrame, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """Return class probabilities or codes of images, or images of latent vectors."""
        network = self.bundle.network
        match network:
            case Classifier():
                return self.bundle.predict(model_input)
            case Encoder():
                return self.bundle.embed(model_input)
        conditions = None
        if network.conditions:
            labels = self._labels(model_input)
            model_input = np.array(model_input["latents"].tolist(), np.float32).reshape(-1, network.latent)
            conditions = network.asked(torch.from_numpy(labels))
        with torch.inference_mode():
            latents = torch.from_numpy(np.ascontiguousarray(model_input))
            if params and params.get("truncation"):
                latents = truncated(latents, self._threshold(params["truncation"]))
            return to_uint8(network(latents, conditions)).numpy()

    @staticmethod
    def _threshold(asked: float) -> float:
        if not 0 < asked < float("inf"):
            raise MlflowException(f"truncation: received {asked!r}, expected a number > 0", INVALID_PARAMETER_VALUE)
        return float(asked)

    def _labels(self, table: pd.DataFrame) -> np.ndarray:
        """Return the requested classes, (b,) int64."""
        labels = np.random.default_rng().integers(len(self.bundle.classes), size=len(table))
        if "class" in table:
            for row, asked in enumerate(table["class"]):
                if asked is not None and asked is not pd.NA and asked == asked:  # NaN marks an absent float
                    labels[row] = self._label(asked)
        return labels

    def _label(self, asked: Any) -> int:
        classes = self.bundle.classes
        # Names take precedence: the classes of digits have numbers as names.
        if isinstance(asked, str) and asked in classes:
            return classes.index(asked)
        # A column of indices with an absent entry holds floats.
        if isinstance(asked, int | float | np.number) and asked in range(len(classes)):
            return int(asked)
        raise MlflowException(
            f"class {asked!r} received; classes are {', '.join(classes[:50])}, or their indices from 0 to "
            f"{len(classes) - 1}",
            INVALID_PARAMETER_VALUE,
        )


mlflow.models.set_model(ServedModel())
