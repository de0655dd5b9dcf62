"""The process of the job service."""

from __future__ import annotations

import pytest
from mlflow.exceptions import RESOURCE_DOES_NOT_EXIST, MlflowException

from pipelines.errors import ServiceError
from services.jobs import server
from services.jobs.states import State
from services.jobs.store import Untracked
from services.tracking import run


@pytest.mark.parametrize(
    ("cause", "raised"),
    [(ConnectionError("refused"), True), (MlflowException("no such run", RESOURCE_DOES_NOT_EXIST), False)],
)
def test_a_run_that_is_gone_holds_up_no_other(monkeypatch: pytest.MonkeyPatch, cause: Exception, raised: bool) -> None:
    def fail(*_: object) -> None:
        raise ServiceError("could not mark the run") from cause

    monkeypatch.setattr(run, "mark", fail)
    told = Untracked("job-1", "f00d", State.FAILED, "its driver died")
    if raised:
        with pytest.raises(ServiceError):
            server._track("http://127.0.0.1:9", told)
    else:
        server._track("http://127.0.0.1:9", told)
