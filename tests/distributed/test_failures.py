"""A failure of one rank ends all ranks with a typed error within the deadline."""

from __future__ import annotations

from pathlib import Path

import pytest
from failures import PLACES, Case, run_cases
from runs import stripes

from pipelines.data.loader import ShardedDataset

FAMILIES = ("mlp", "transport", "gan", "learned-transport", "flow")
"""A classifier, and each way to train a generator: plans, a critic, a learned cost, a flow."""

MATRIX = [
    Case(place, rank, kind, "fails" if (i + j) % 2 else "breaks")
    for i, place in enumerate(PLACES)
    for rank in range(2)
    for j, kind in enumerate(FAMILIES)
]
SLEEPING = [
    Case("opening the data", 0, "mlp", "sleeps"),
    Case("training", 1, "transport", "sleeps"),
    Case("evaluating", 0, "gan", "sleeps"),
]
DYING = [
    Case("opening the data", 1, "mlp", "dies"),
    Case("training", 0, "gan", "dies"),
    Case("evaluating", 0, "transport", "dies"),
    Case("saving a checkpoint", 0, "flow", "dies"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: ShardedDataset = stripes(tmp_path_factory.mktemp("stripes"))
    return Path(found.address)


@pytest.fixture(scope="module")
def matrix(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, dict[int, str]]:
    return run_cases([*MATRIX, *SLEEPING], data, tmp_path_factory.mktemp("matrix"))


@pytest.mark.slow
@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.name)
def test_an_error_of_one_rank_is_the_error_of_all(matrix: dict[Case, dict[int, str]], case: Case) -> None:
    found = matrix[case]
    if case.fault == "fails":
        assert found == dict.fromkeys((0, 1), "ShardError: shard-00001: damaged\n  hint: shard it anew")
    else:
        assert found[case.rank] == "untyped OSError: no space left on device"
        assert found[1 - case.rank].startswith(
            f"RankError: rank {case.rank} failed while {case.place}: OSError: no space left on device\n  hint: "
        )


@pytest.mark.slow
@pytest.mark.parametrize("case", SLEEPING, ids=lambda case: case.name)
def test_a_rank_that_sleeps_is_named(matrix: dict[Case, dict[int, str]], case: Case) -> None:
    found = matrix[case]
    assert found[1 - case.rank].startswith(f"RankError: rank {case.rank} was lost or came too late while ")
    assert found[case.rank] == found[1 - case.rank]


@pytest.mark.slow
@pytest.mark.parametrize("case", DYING, ids=lambda case: case.name)
def test_a_rank_that_dies_is_named(data: Path, tmp_path: Path, case: Case) -> None:
    found = run_cases([case], data, tmp_path)[case]
    assert found.keys() == {1 - case.rank}
    assert found[1 - case.rank].startswith(f"RankError: rank {case.rank} was lost or came too late while ")
