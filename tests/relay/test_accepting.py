"""A listener at which nothing can be accepted, on each relay."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from meshnet.net import sockets

RELAYS = ("native", "python")
_PROLOGUE = """
import errno, logging, socket, sys, time, trio
from meshnet.model.connection import Direction
from meshnet.relay.native import NativeRelay
from meshnet.relay.python import PythonRelay
from tests.seccomp import Refusal, refuse
from tests.world import SLOWNESS

RELAY = {"native": NativeRelay, "python": PythonRelay}[sys.argv[1]]
said = []

class Listen(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())

logging.getLogger("meshnet").addHandler(Listen())

async def until(condition):
    with trio.fail_after(10 * SLOWNESS):
        while not condition():
            await trio.sleep(0.01)

"""


def run(relay: str, body: str) -> None:
    """In a process of its own, for its system calls are filtered."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _PROLOGUE + body, relay]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("relay", RELAYS)
def test_who_may_not_accept_says_so_once_waits_and_can_be_ended(relay: str) -> None:
    """As a policy of the kernel's refuses it: no errno that accept(2) lists for one connection."""
    run(
        relay,
        """
async def main():
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    refuse(Refusal("accept4", {}, errno.EPERM))
    async with RELAY() as relay, trio.open_nursery() as nursery:
        nursery.start_soon(lambda: relay.accept_forever(listener, Direction.OUTBOUND, print, shared=False))
        with socket.create_connection(listener.getsockname()):
            await until(lambda: said)
            begun = time.process_time()
            await trio.sleep(1)  # ten tries
            assert time.process_time() - begun < 0.5, "it spins"
            assert said == [f"cannot accept on port {listener.getsockname()[1]}: Operation not permitted"], said
            nursery.cancel_scope.cancel()

trio.run(main)
""",
    )


@pytest.mark.parametrize("relay", RELAYS)
def test_a_listener_that_is_none_is_an_error_and_not_waited_for(relay: str) -> None:
    run(
        relay,
        """
async def main():
    listener = socket.socket()  # nothing listens, and epoll says so at once
    listener.bind(("127.0.0.1", 0))
    listener.setblocking(False)
    async with RELAY() as relay:
        with trio.fail_after(10 * SLOWNESS):
            try:
                await relay.accept_forever(listener, Direction.OUTBOUND, print, shared=False)
            except OSError as error:
                assert error.errno == errno.EINVAL, error
            else:
                raise AssertionError("it ended")

trio.run(main)
""",
    )


def test_both_relays_know_the_same_errors_of_one_connection() -> None:
    source = (Path(sockets.__file__).parents[1] / "relay" / "native" / "listen.c").read_text()
    body = source.partition("is_of_one_connection(int error)")[2].partition("default:")[0]
    named = {getattr(errno, name) for name in re.findall(r"case (E\w+):", body)}
    assert named == sockets._OF_ONE_CONNECTION
