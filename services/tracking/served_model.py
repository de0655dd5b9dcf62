"""The script that MLflow stores beside a registered model and runs to load it ("models from code"; no pickle).

It stands alone: MLflow runs it by path, with the copy of ``pipelines`` that was stored with the model.

A classifier takes images, (b, c, h, w) uint8, and answers class probabilities, (b, classes) float32. A generator takes
latent vectors, (b, latent) float32, drawn from the standard normal distribution by whoever calls, and answers images,
(b, c, h, w) uint8: the answer is a function of the input alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.pyfunc import PythonModel

from pipelines.models.bundle import Bundle, to_uint8
from pipelines.models.network import Generator


class ServedModel(PythonModel):
    """A :class:`~pipelines.models.bundle.Bundle` behind MLflow's ``predict``."""

    def load_context(self, context: Any) -> None:
        """Read weights and card from the model's artifacts."""
        self.bundle = Bundle.load(Path(context.artifacts["weights"]).parent)

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """Class probabilities of images, or images of latent vectors."""
        network = self.bundle.network
        if not isinstance(network, Generator):
            return self.bundle.predict(model_input)
        with torch.inference_mode():
            return to_uint8(network(torch.from_numpy(np.ascontiguousarray(model_input)))).numpy()


mlflow.models.set_model(ServedModel())
