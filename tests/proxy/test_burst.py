"""Bursts to peers that `web` has no tunnels to: two thousand connections at once, and more than there is time for."""

import selectors
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from meshnet.errors import Reason
from meshnet.model.resource import (
    API_VERSION,
    BreakerSpec,
    ConnectSpec,
    LimitsSpec,
    Metadata,
    TrafficPolicy,
    TrafficPolicySpec,
)
from tests.proxy import metrics
from tests.proxy.conftest import API, Hosts
from tests.proxy.far import Far, serving
from tests.proxy.programs import TIMEOUT, echo, stopped
from tests.world import wait_for

pytestmark = pytest.mark.netns

TWIN, SLOW = "10.96.0.50", "10.96.0.51"
BURST, AT_ONCE, SOME = 2000, 16, 80
NUMBER = 4  # bytes


class Clients:
    """Connections that say their number, in the order in which they were begun; `answered` as the answers came."""

    def __init__(self, stack: ExitStack) -> None:
        self.answered: list[int] = []
        self._stack = stack
        self._selector = stack.enter_context(selectors.DefaultSelector())
        self._count = 0

    def begin(self, hosts: Hosts, address: str, count: int) -> range:
        began = range(self._count, self._count + count)
        for number in began:
            client = self._stack.enter_context(hosts.web.open_socket())
            client.setblocking(False)
            client.connect_ex((address, 8080))
            self._selector.register(client, selectors.EVENT_WRITE, number)
        self._count += count
        return began

    def wait(self) -> None:
        """Until each has its answer. Raises OSError when one is reset, TimeoutError when nothing happens any more."""
        while len(self.answered) < self._count:
            if not (ready := self._selector.select(TIMEOUT)):
                raise TimeoutError(f"{len(self.answered)} of {self._count} were answered")
            for key, _ in ready:
                assert isinstance(key.fileobj, socket.socket)
                said = int(key.data).to_bytes(NUMBER, "big")
                if key.events == selectors.EVENT_WRITE:
                    key.fileobj.sendall(said)
                    self._selector.modify(key.fileobj, selectors.EVENT_READ, key.data)
                else:
                    assert key.fileobj.recv(NUMBER) == said
                    self.answered.append(key.data)
                    self._selector.unregister(key.fileobj)


def test_a_burst_to_cold_peers_is_served_in_a_fair_order_with_few_handshakes_at_once(hosts: Hosts) -> None:
    patient = TrafficPolicySpec(
        services=("api", "twin"),
        limits=LimitsSpec(max_connections=0),
        breaker=BreakerSpec(failures=1_000_000),
        connect=ConnectSpec(attempt_timeout="60s", total_timeout="60s"),
    )
    hosts.write(
        hosts.mesh.service("twin", [8080], [hosts.twin], addresses=[TWIN]),
        TrafficPolicy(api_version=API_VERSION, metadata=Metadata(name="patient"), spec=patient),
    )
    few = BURST // 5
    with ExitStack() as stack:
        for host in (hosts.api, hosts.twin):
            stack.enter_context(echo(host, 8080))
        clients = Clients(stack)
        with stopped(hosts.sidecar(hosts.api)), stopped(hosts.sidecar(hosts.twin)):
            to_api = clients.begin(hosts, API, BURST - few)
            wait_for(lambda: _waiting(hosts) == BURST - few - AT_ONCE, what="the burst waits for its turns")
            to_twin = clients.begin(hosts, TWIN, few)
            wait_for(lambda: _waiting(hosts) == BURST - AT_ONCE, what="the others wait too")
            assert metrics.value(hosts.web, "meshnet_tunnels", state="handshake") == AT_ONCE
        clients.wait()
        assert metrics.value(hosts.web, "meshnet_tunnels", state="leased") == BURST
        still_open = [each for each in hosts.sidecar(hosts.web).connections() if each.reason is None]
        assert len(still_open) == len({each.id for each in still_open}) == BURST
        # And the few that are made ahead, for the burst may go on.
        assert BURST <= metrics.value(hosts.web, "meshnet_tls_handshake_seconds_count") <= BURST + 2 * 64
        # From the first answer of a peer on, its ticket makes the others cheaper, though no lease has ended yet.
        assert metrics.value(hosts.web, "meshnet_tls_resumed_total") >= BURST / 2
        turns = {number: turn for turn, number in enumerate(clients.answered)}
        assert _is_in_order(to_api, turns)
        assert _is_in_order(to_twin, turns)
        # The peers take turns: who came last but for another peer is through long before the burst is.
        assert max(turns[number] for number in to_twin) < BURST / 2
    wait_for(lambda: metrics.value(hosts.web, "meshnet_tunnels", state="leased") == 0)
    assert metrics.value(hosts.web, "meshnet_tunnels", state="idle") <= 2 * 64


def test_what_our_own_queue_takes_opens_no_breaker(hosts: Hosts) -> None:
    """With the usual limits, and a peer that is well but far away: it takes 0.6 s to shake hands."""
    hosts.write(hosts.mesh.service("slow", [8080], [hosts.outside], addresses=[SLOW]))
    with ExitStack() as stack:
        far = stack.enter_context(serving(hosts.outside, hosts.mesh))
        servers = stack.enter_context(ThreadPoolExecutor(2 * AT_ONCE))
        serve = [servers.submit(_serve, far) for _ in range(2 * AT_ONCE)]
        Clients(stack).begin(hosts, SLOW, BURST // 5)

        wait_for(lambda: _settled(hosts) == BURST // 5, what="the burst is served, or has failed")
        burst = [each for each in hosts.sidecar(hosts.web).connections() if each.destination.address == f"{SLOW}:8080"]
        (endpoint,) = (each for each in hosts.sidecar(hosts.web).endpoints().items if each.service == "slow:8080")
    assert all(each.result() is None for each in serve)
    assert {each.reason and each.reason.code for each in burst} == {None, Reason.LIMIT_QUEUE_TIMEOUT}
    assert {attempt.result for each in burst for attempt in each.attempts} == {"ok", Reason.LIMIT_QUEUE_TIMEOUT}
    assert (endpoint.breaker, endpoint.failures) == ("closed", 0)


def _serve(far: Far) -> None:
    """One tunnel after the other, until no more come."""
    while True:
        try:
            tunnel = far.accept(shakes_after=0.6)
            tunnel.asked()
            tunnel.say(tunnel.wire.opened())
        except TimeoutError:
            return
        except (OSError, EOFError):
            pass  # it was given up


def _settled(hosts: Hosts) -> float:
    """Connections that have a tunnel, or have failed."""
    leased = metrics.value(hosts.web, "meshnet_tunnels", state="leased")
    return leased + metrics.value(
        hosts.web, "meshnet_tcp_connections_failed_total", reporter="source", destination_service="slow:8080"
    )


def _waiting(hosts: Hosts) -> float:
    return metrics.value(hosts.web, "meshnet_tunnel_waiting")


def _is_in_order(numbers: Sequence[int], turns: dict[int, int]) -> bool:
    """Every `SOME` of them are answered before those after the next are, as far as the middle of each tells.

    Tunnels are had in order; but a few dozen that the far sidecar had to judge, while its processor was another's, are
    overtaken there by those that came when it had judged.
    """
    parts = [numbers[start : start + SOME] for start in range(0, len(numbers), SOME)]
    middles = [sorted(turns[number] for number in part)[SOME // 2] for part in parts]
    return all(one < two for one, two in zip(middles, middles[2:], strict=False))
