"""Pages of the MLflow UI, as paths to append to its address.

The UI opens in its mode for language models unless the address selects the mode for model training.
"""

from __future__ import annotations

_MODE = "workflowType=machine_learning"

EXPERIMENTS = f"/#/experiments?{_MODE}"


def run_page(experiment: str, run: str) -> str:
    """Return the page of a run."""
    return f"/#/experiments/{experiment}/runs/{run}?{_MODE}"
