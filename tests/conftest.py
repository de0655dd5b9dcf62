"""Configuration for all tests: run-time checks of shapes and types in ``pipelines``, and one torch thread."""

import jaxtyping

jaxtyping.install_import_hook("pipelines", "beartype.beartype")

import torch  # noqa: E402

# The order of sums over threads is not deterministic, and the cores of the test machine are shared.
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
