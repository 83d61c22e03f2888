"""Fixtures that the tests of `math` share."""

from __future__ import annotations

import pytest
from schedule_cases import SCHEDULES

from diffdistill.math.schedules import Schedule


@pytest.fixture(params=SCHEDULES, ids=str)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    """Every kind of schedule in turn."""
    return SCHEDULES[request.param]
