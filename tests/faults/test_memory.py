"""A sidecar that gets no more memory (RLIMIT_AS): it refuses what it cannot serve, or it ends and another begins."""

import socket
import time
from contextlib import ExitStack

import pytest

from tests.faults.causes import SECRET, answers, is_over, memory
from tests.faults.strange import another_host, strange
from tests.proxy.programs import Records, ask, echo, read, reason, reset
from tests.traffic.conftest import Hosts, Name, traffic
from tests.world import Host, wait_for

pytestmark = pytest.mark.netns

FEW, MANY = 5, 300  # clients that fail, after which it is seen what has become of the sidecar
MOST = 3000  # clients
LONG = 10.0  # seconds
MORE = 1 << 18  # bytes, beyond what it has
TOLD = {"ok", "peer.rst", "limit.host", "tls.handshake", "connect.timeout", "connect.refused", "tunnel.lost"}


@pytest.mark.parametrize("side", ["caller", "endpoint"])
@pytest.mark.parametrize("failures", [FEW, MANY])
def test_a_sidecar_without_memory_refuses_or_ends_and_never_lingers_deaf(
    hosts: Hosts, name: Name, side: str, failures: int
) -> None:
    host, other = another_host(hosts), hosts.new_name()
    caller, endpoint = (host, hosts.apis[0]) if side == "caller" else (hosts.web, host)
    patient = {"attempts": 1, "attemptTimeout": "1s"}
    hosts.write(
        hosts.service(name, [endpoint]),
        hosts.service(other, [hosts.apis[1]]),
        traffic(name, limits={"maxConnections": 0}, connect=patient, breaker={"failures": 1_000_000}),
    )
    with strange(hosts, host) as sidecar, echo(endpoint, name.port), echo(hosts.apis[1], other.port):
        assert sidecar.process is not None
        wait_for(lambda: ask(caller, name.address, name.port, SECRET) == SECRET, what="all is well")
        out = Records(sidecar)
        with ExitStack() as stack:
            kept: list[socket.socket] = []
            with memory(sidecar, MORE):
                failed, until = 0, time.monotonic() + LONG
                for _ in range(MOST):
                    # CPython may stand still for as long as it has no 32 bytes for an exception that is on its way
                    # (exception_unwind of 3.11); what looks after it sees that: WatchdogSec, a liveness probe.
                    if failed == failures or not sidecar.process.alive or (failed and time.monotonic() > until):
                        break
                    try:
                        kept.append(talks(caller, name, stack))
                    except (OSError, EOFError):
                        failed += 1
                assert failed
                assert ask(hosts.web, other.address, other.port, SECRET) == SECRET
            wait_for(lambda: is_over(sidecar) or answers(sidecar), timeout=30.0, what="it ends, or it is there")
            if is_over(sidecar):
                sidecar.spawn()  # as what looks after it does
                sidecar.wait_until_ready()
            else:
                told = {reason(it).partition(" ")[0]: it.reason.message for it in out.now() if it.reason}
                assert not told.keys() - TOLD, told
                for client in kept:
                    client.sendall(SECRET)
                    assert read(client, len(SECRET)) == SECRET
            wait_for(lambda: ask(caller, name.address, name.port, SECRET) == SECRET, timeout=30.0)
            for client in kept:
                reset(client)


def talks(caller: Host, name: Name, stack: ExitStack) -> socket.socket:
    """A client that has had an answer."""
    client = stack.enter_context(caller.connect(name.address, name.port))
    client.sendall(SECRET)
    assert read(client, len(SECRET)) == SECRET
    return client
