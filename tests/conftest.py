"""For every test: shapes and types of ``pipelines`` are checked at run time, and torch keeps to one thread."""

import jaxtyping

jaxtyping.install_import_hook("pipelines", "beartype.beartype")

import torch  # noqa: E402

# Sums over threads come in an order of their own, and the test machine's cores are shared.
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
