"""Requirements of a job on its data before training."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import (
    ModelNotFoundError,
    MongeError,
    ObjectNotFoundError,
    ServiceError,
    SourceError,
    StorageError,
    TrainingError,
)
from pipelines.spec import load_spec
from services.jobs import driver
from services.settings import Settings
from services.sharding import dataset

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize(("config", "refused"), [("lenet.yaml", True), ("flow.yaml", False)])
def test_one_class_is_enough_for_a_generator_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, refused: bool
) -> None:
    (tmp_path / "root" / "cats").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(np.full((28, 28), i, np.uint8)).save(tmp_path / "root" / "cats" / f"{i}.png")
    monkeypatch.setattr(dataset, "shard_dataset", functools.partial(dataset.shard_dataset, workers=0))
    spec = load_spec(CONFIGS / config, [f"data.source={tmp_path / 'root'}"])
    settings = Settings(home=tmp_path / "home")
    if refused:
        with pytest.raises(SourceError, match="root: found one class, 'cats'; a classifier needs at least two"):
            driver._shard(spec, settings)
    else:
        assert (Path(driver._shard(spec, settings)) / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ServiceError("MLflow is away"), True),
        (StorageError("S3 does not answer"), True),
        (ModelNotFoundError("no model"), False),
        (ObjectNotFoundError("no bucket"), False),
        (SourceError("no images"), False),
        (TrainingError("the workers failed"), False),
    ],
)
def test_what_may_pass_is_no_error_of_the_job(error: MongeError, passes: bool) -> None:
    assert driver.can_retry_job(error) == passes


def test_an_attempt_waits_for_its_storage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    faults: list[MongeError] = [StorageError("no answer"), StorageError("no answer")]

    class Away:
        def claim(self) -> None:
            if faults:
                raise faults.pop()

    pauses: list[float] = []
    monkeypatch.setattr(driver.time, "sleep", pauses.append)
    driver._claim(cast(Any, Away()))
    assert pauses == [driver.PAUSE, driver.PAUSE]
    assert capsys.readouterr().out.count("waiting for the storage: no answer") == 2
    faults.append(ObjectNotFoundError("there is no bucket"))
    with pytest.raises(ObjectNotFoundError):
        driver._claim(cast(Any, Away()))
    faults.extend([StorageError("no answer")] * 3)
    monkeypatch.setattr(driver, "PATIENCE", -1.0)
    with pytest.raises(StorageError):
        driver._claim(cast(Any, Away()))
