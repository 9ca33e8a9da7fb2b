"""The whole run happens in network namespaces of its own; see tests/world.py."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.produced import has_to_be_told

pytest_plugins = ["tests.world"]

# A shell that starts the run in the background has it ignore Ctrl-C, and every program that the tests start as well.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The machines are shared: how long an example takes, or takes to be made, says nothing about the code.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests have measured, by `record_property("measured", ...)`."""
    for report in terminalreporter.getreports("passed"):
        for key, value in report.user_properties:
            if key == "measured":
                terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {value}")


@pytest.fixture
def real_root() -> bool:
    """Whether users and groups beside 0 exist here; they do not in the user namespace of somebody without root."""
    return os.getuid() == 0 and int(Path("/proc/self/gid_map").read_text().split()[2]) > 1


@pytest.fixture(autouse=True)
def produces_what_it_says(request: pytest.FixtureRequest) -> Iterator[None]:
    """The mark `produces` is no claim: the test's records are looked at."""
    reasons = [reason for mark in request.node.iter_markers("produces") for reason in mark.args]
    with has_to_be_told(reasons):
        yield
