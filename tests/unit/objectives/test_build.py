"""Construction of objectives from specs."""

from pathlib import Path

import pytest

from pipelines.errors import SpecError
from tests.runs import job, start, stripes


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"cat": 2}, "the data set has no class 'cat'.*choose among 0, 1"),
        ({"0": 0, "1": 0}, "all classes weigh 0"),
    ],
)
def test_weights_are_of_the_data_set_s_classes(tmp_path: Path, weights: dict[str, float], message: str) -> None:
    spec = job("transport")
    objective = spec.objective.model_copy(update={"class_weights": weights})
    with pytest.raises(SpecError, match=f"(?s)objective.class_weights: {message}"):
        start(spec.model_copy(update={"objective": objective}), stripes(tmp_path))
