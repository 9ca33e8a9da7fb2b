"""What connect() fails with."""

import pytest

from meshnet.decide.truth import refused
from meshnet.errors import Reason


@pytest.mark.parametrize("reason", [None, *Reason])
def test_only_an_endpoint_that_nobody_answered_for_is_unreachable(reason: Reason | None) -> None:
    assert refused(reason) == (reason not in (Reason.CONNECT_TIMEOUT, Reason.CONNECT_UNREACHABLE))
