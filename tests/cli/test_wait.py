"""`meshnet wait`: as long as it takes, and no longer than it may."""

import json
import threading
from pathlib import Path

import msgspec
import pytest

from tests.cli.conftest import Meshnet
from tests.cli.sidecar import Sidecar
from tests.cli.test_status import NOT_READY, READY


def test_a_sidecar_that_is_ready_is_not_waited_for(sidecar: Sidecar, meshnet: Meshnet) -> None:
    sidecar.will_answer(READY)
    done = meshnet("wait")
    assert (done.exit_code, done.stdout) == (0, "ready\n")
    waited = json.loads(meshnet("wait", "-o", "json").stdout)
    assert (waited["kind"], waited["ready"], waited["seconds"] < 5) == ("Waited", True, True)


def test_one_that_gets_ready_ends_the_wait(sidecar: Sidecar, meshnet: Meshnet) -> None:
    sidecar.will_answer(NOT_READY)

    def get_ready() -> None:
        for _ in range(3):
            sidecar.asked()
        sidecar.will_answer(READY)

    thread = threading.Thread(target=get_ready)
    thread.start()
    try:
        assert meshnet("wait", "--timeout", "30s").stdout == "ready\n"
    finally:
        thread.join()


def test_out_of_time_it_says_what_is_missing(sidecar: Sidecar, meshnet: Meshnet) -> None:
    sidecar.will_answer(NOT_READY)
    failed = meshnet("wait", "--timeout", "300ms")
    assert failed.exit_code == 6
    assert "not ready within 0.3s" in failed.stderr
    assert "no certificate; the redirect rules are not in place" in failed.stderr
    assert "fix: meshnet status" in failed.stderr


def test_one_that_is_not_there_yet_is_waited_for(meshnet: Meshnet, tmp_path: Path) -> None:
    failed = meshnet("wait", "--timeout", "300ms", "--socket", str(tmp_path / "nobody.sock"))
    assert failed.exit_code == 6
    assert "no sidecar answers" in failed.stderr


def test_what_waiting_does_not_mend_ends_at_once(sidecar: Sidecar, meshnet: Meshnet) -> None:
    sidecar.answers = [b'{"kind":"Status"}']
    failed = meshnet("wait", "--timeout", "30s")
    assert failed.exit_code == 1
    assert "makes no sense" in failed.stderr


@pytest.mark.parametrize("state", ["draining", "silent"])
def test_there_is_always_a_reason(sidecar: Sidecar, meshnet: Meshnet, state: str) -> None:
    sidecar.will_answer(msgspec.structs.replace(READY, ready=False, draining=state == "draining"))
    failed = meshnet("wait", "--timeout", "200ms")
    assert failed.exit_code == 6
    assert ("it is draining" if state == "draining" else "it does not say why") in failed.stderr
