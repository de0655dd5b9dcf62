"""bfloat16 where devices support it, float32 elsewhere."""

from collections.abc import Callable

import pytest
import torch
from runs import CPU, go_on, job, start

from pipelines.data.loader import ShardedDataset
from pipelines.training import precision
from pipelines.training.precision import training_precision


@pytest.mark.parametrize(
    ("asked", "has", "used"),
    [
        ("float32", True, torch.float32),
        ("bfloat16", True, torch.bfloat16),
        ("bfloat16", False, torch.float32),
    ],
)
def test_emulated_bfloat16_is_not_used(
    asked: str, has: bool, used: torch.dtype, data: ShardedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "supports_bfloat16", lambda device: has)
    spec = job("mlp", images=32, precision=asked)
    assert training_precision(spec.train, CPU) == used
    objective, state = start(spec, data)
    computed = []

    def recorded(inner: Callable[..., object]) -> Callable[..., object]:
        def loss(step: object) -> object:
            on = torch.is_autocast_enabled("cpu")
            computed.append(torch.get_autocast_dtype("cpu") if on else torch.float32)
            return inner(step)

        return loss

    for phase in objective.phases:
        object.__setattr__(phase, "loss", recorded(phase.loss))
    go_on(spec, data, objective, state)
    assert set(computed) == {used}
