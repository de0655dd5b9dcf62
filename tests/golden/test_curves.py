"""Loss curves are identical to the stored files; see ``curves.py`` for how to update them."""

import pytest
from curves import FOLDER, KINDS, STEPS, curves, dataset

from pipelines.data.loader import ShardedDataset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    return dataset(tmp_path_factory.mktemp("digits"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_curve_is_the_one_on_file(data: ShardedDataset, kind: str) -> None:
    found = curves(kind, data)
    assert len(found.splitlines()) == STEPS + 1
    assert found == (FOLDER / f"{kind}.txt").read_text(encoding="utf-8"), (
        "what training computes has changed; if it is meant to, see curves.py for how to rewrite the files"
    )


def test_every_file_has_its_curve() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(KINDS)
