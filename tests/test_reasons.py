"""Every reason code is produced by a test on real traffic, and told with cause and cure."""

import re
from pathlib import Path

import pytest

from meshnet.errors import Reason
from meshnet_cli.reasons import ADVICE

ROOT = Path(__file__).parent
ROOMS = ("faults", "proxy", "traffic", "relay")  # of tests on sockets; a dead host takes a minute, so a relay is told
TEXT = "\n".join(file.read_text() for room in ROOMS for file in sorted((ROOT / room).rglob("*.py")))


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_a_test_that_produces_it(reason: Reason) -> None:
    """As records tell it: `code by who in phase`, or the code by itself; or by its name."""
    words = rf"[\"']{re.escape(reason)}( by |[\"':])|\bReason\.{reason.name}\b"
    assert re.search(words, TEXT), f"no test in {', '.join(ROOMS)} has a connection end with {reason}"


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_a_cause_and_a_cure(reason: Reason) -> None:
    advice = ADVICE[reason]
    assert advice.cause
    assert advice.cure
