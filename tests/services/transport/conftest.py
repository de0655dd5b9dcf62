import pytest

from tests.services.transport.support import GatedSolver


@pytest.fixture
def gated() -> GatedSolver:
    return GatedSolver()
