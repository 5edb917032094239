"""That the suite is run as a whole."""

from __future__ import annotations

import pytest

from mens_core.testing.conformance import (
    disk,
    dropping,
    forward,
    generating,
    offers,
    opening,
    patterned,
    replacing,
    saving,
    state,
    step,
    weights,
)
from mens_core.testing.conformance.workbench import Workbench

__all__ = ["TESTS", "test_the_suite_is_whole"]

_PARTS = (offers, opening, forward, step, dropping, patterned, replacing, saving, state, weights, generating, disk)

TESTS = {name: getattr(part, name) for part in _PARTS for name in part.__all__ if name.startswith("test_")}
"""Name → test function."""


def test_the_suite_is_whole(request: pytest.FixtureRequest, workbench: Workbench) -> None:
    del workbench  # so that what is wrong with the declarations is told first
    gone = [name for name, test in TESTS.items() if getattr(request.module, name, None) is not test]
    if gone:
        pytest.fail(
            f"tests of the suite are left out or replaced: {', '.join(gone)}; what a backend cannot do is declared in "
            "Capabilities, closed with a reason",
            pytrace=False,
        )
