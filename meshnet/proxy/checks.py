"""Active checks: endpoints of services whose TrafficPolicy asks for it are tried on an interval.

Who fails is passed over. No connections of users: they have no record and take no place of a limit.

A meshed endpoint is checked through a tunnel, by its sidecar: an OPEN with `check` in it, which is answered by REFUSED,
also when all is well, so that no lease begins.
"""

import heapq
import itertools
import logging
import math
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import trio

from meshnet.codec.frames import Check, Open
from meshnet.decide.breaker import is_endpoints_fault
from meshnet.decide.health import Health, Healths, first_check_after, next_check_after
from meshnet.errors import ConnectionFailed, Reason
from meshnet.model.address import Address
from meshnet.model.service import CheckSettings, Endpoint, OnEject, ServicePort, TunnelKind
from meshnet.net.check import check_application
from meshnet.proxy.patience import Patience
from meshnet.proxy.slices import slices

if TYPE_CHECKING:  # it holds the checks
    from meshnet.proxy.state import ProxyState

_log = logging.getLogger("meshnet.checks")

_AT_ONCE = 256  # with more that are due and do not answer, intervals get longer
_ON_THE_WAY = 0.5  # seconds beyond the timeout for a peer's answer
_KEPT_TUNNELS_TRIED = 3  # that turn out to be dead, as for a connection

PortKey = tuple[str, str, int]
"""Namespace and name of the service, and port."""


class Checked:
    """One endpoint of one service port."""

    __slots__ = ("endpoint", "error", "gone", "health", "key", "service", "tried")

    def __init__(self, service: ServicePort, endpoint: Endpoint, settings: CheckSettings) -> None:
        self.key = _key(service)
        self.service = service
        self.endpoint = endpoint
        self.health = Health(settings)
        self.tried = False
        self.error = ""  # of the last check, if it failed or said nothing
        self.gone = False


class Checks:
    """What was learned outlives a change of the mesh, for endpoints that stay."""

    def __init__(self, state: "ProxyState") -> None:
        self._state = state
        self._dice = state.dice
        self._turns = trio.Semaphore(_AT_ONCE)
        self._checked: dict[PortKey, dict[Address, Checked]] = {}
        self._healths: dict[PortKey, Healths] = {}
        self._due: list[tuple[float, int, Checked]] = []
        self._sequence = itertools.count()
        self._sooner = trio.Event()
        self.counts = {"passed": 0, "failed": 0, "undecided": 0}
        self.answered = 0  # that peers have asked for

    async def run(self) -> None:
        """Until it is cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                with trio.move_on_at(self._due[0][0] if self._due else math.inf):
                    await self._sooner.wait()
                self._sooner = trio.Event()
                while self._due and self._due[0][0] <= trio.current_time():
                    _, _, checked = heapq.heappop(self._due)
                    if not checked.gone:
                        await self._turns.acquire()
                        nursery.start_soon(self._check, checked)

    async def follow(self, services: Sequence[ServicePort]) -> None:
        """Checks what these ask for, and no more than that. Other tasks run meanwhile; calls must not overlap."""
        wanted = [service for service in services if service.traffic.check is not None]
        for service in wanted:
            assert service.traffic.check is not None
            await self._follow(service, service.traffic.check)
        for key in self._checked.keys() - {_key(service) for service in wanted}:
            for checked in self._checked.pop(key).values():
                checked.gone = True
            del self._healths[key]

    def passed_over(self, service: ServicePort) -> Collection[Address]:
        """The endpoints that are to get no connections while there are others."""
        healths = self._healths.get(_key(service)) if service.traffic.check is not None else None
        return () if healths is None else healths.passed_over()

    def view(self, service: ServicePort, endpoint: Endpoint) -> tuple[str, str]:
        """`passing`, `failing`, `panic` (failing, and used all the same), or nothing; and why the last check failed.

        Nothing, where there was no check yet that said something; why it did not is told too.
        """
        checked = self._checked.get(_key(service), {}).get(endpoint.address)
        if service.traffic.check is None or checked is None:
            return "", ""
        if checked.health.healthy:
            return ("passing" if checked.tried else ""), checked.error
        return ("panic" if self._healths[checked.key].panic else "failing"), checked.error

    def failing(self, service: ServicePort) -> tuple[int, bool] | None:
        """How many fail, and whether they are used all the same; None where nothing is checked. Any thread may ask."""
        healths = self._healths.get(_key(service)) if service.traffic.check is not None else None
        return None if healths is None else (healths.failing(), healths.panic)

    async def _follow(self, service: ServicePort, settings: CheckSettings) -> None:
        key = _key(service)
        healths = self._healths.setdefault(key, Healths())
        known = self._checked.setdefault(key, {})
        there: set[Address] = set()
        now = trio.current_time()
        for endpoints in slices(service.endpoints):
            for endpoint in endpoints:
                there.add(endpoint.address)
                checked = known.get(endpoint.address)
                if checked is None:
                    checked = known[endpoint.address] = Checked(service, endpoint, settings)
                    self._schedule(checked, now + first_check_after(settings, self._dice))
                elif checked.health.settings.interval > settings.interval:
                    checked = known[endpoint.address] = self._sooner_checked(checked, settings, now)
                checked.service, checked.endpoint, checked.health.settings = service, endpoint, settings
            await trio.lowlevel.checkpoint()
        for address in known.keys() - there:
            known.pop(address).gone = True
            healths.changed(address, healthy=True)
        healths.now([endpoint.address for endpoint in service.endpoints if endpoint.weight])

    def _sooner_checked(self, checked: Checked, settings: CheckSettings, now: float) -> Checked:
        """The same in another's place, which need not wait as long as the old interval says."""
        checked.gone = True
        other = Checked(checked.service, checked.endpoint, settings)
        other.health, other.error, other.tried = checked.health, checked.error, checked.tried
        self._schedule(other, now + first_check_after(settings, self._dice))
        return other

    def _schedule(self, checked: Checked, due: float) -> None:
        heapq.heappush(self._due, (due, next(self._sequence), checked))
        if self._due[0][2] is checked:
            self._sooner.set()

    async def _check(self, checked: Checked) -> None:
        due = trio.current_time() + next_check_after(checked.health.settings, self._dice)
        try:
            await self._try(checked.endpoint, checked.service.name, checked.health.settings)
        except ConnectionFailed as failure:
            if is_endpoints_fault(failure.reason):
                self._judge(checked, failure)
            else:
                self.counts["undecided"] += 1
                checked.error = _told(failure)
                _log.debug(
                    "check of %s of %s: undecided, %s", checked.endpoint.name, checked.service.name, checked.error
                )
        except Exception:
            self.counts["undecided"] += 1
            _log.exception("the check of %s of %s failed inside the proxy", checked.endpoint.name, checked.service.name)
        else:
            self._judge(checked, None)
        finally:
            self._turns.release()
        if not checked.gone:
            self._schedule(checked, due)

    def _judge(self, checked: Checked, failure: ConnectionFailed | None) -> None:
        self.counts["failed" if failure else "passed"] += 1
        if checked.gone:
            return
        told = _told(failure) if failure else "passed"
        _log.debug("check of %s of %s: %s", checked.endpoint.name, checked.service.name, told)
        checked.tried = True
        checked.error = _told(failure) if failure else ""
        health, healths = checked.health, self._healths[checked.key]
        if not (health.failed() if failure else health.passed()):
            return
        was_panic = healths.panic
        healths.changed(checked.endpoint.address, health.healthy)
        if failure and not healths.panic and checked.service.traffic.on_eject is OnEject.CLOSE:
            self._state.close_endpoint(checked.endpoint, f"its checks fail: {checked.error}")
        if failure:
            _log.warning("%s of %s fails its checks: %s", checked.endpoint.name, checked.service.name, checked.error)
        else:
            if not was_panic:  # or it had its share all the time
                self._state.warming[checked.endpoint.address] = time.monotonic()
            _log.info("%s of %s passes its checks again", checked.endpoint.name, checked.service.name)
        if healths.panic and not was_panic:
            _log.warning("every endpoint of %s fails its checks: they are used all the same", checked.service.name)
        elif was_panic and not healths.panic:
            _log.info("not every endpoint of %s fails its checks any more", checked.service.name)

    async def _try(self, endpoint: Endpoint, service: str, settings: CheckSettings) -> None:
        """Raises ConnectionFailed."""
        local = self._state.is_local(endpoint.address.host)
        if endpoint.tunnel is not TunnelKind.NONE and not local:
            await self._ask_peer(endpoint, service, settings)
            return
        await check_application(
            endpoint.address,
            send=settings.send.encode(),
            expect=settings.expect.encode(),
            mark=self._state.mark,
            timeout=settings.timeout,
            local=local,
        )

    async def _ask_peer(self, endpoint: Endpoint, service: str, settings: CheckSettings) -> None:
        pool, peer = self._state.pool, (endpoint.tunnel_address, endpoint.identity)
        patience = Patience(time.monotonic(), settings.timeout, settings.timeout)
        request = Open(
            host=endpoint.address.host,
            port=endpoint.address.port,
            service=service,
            deadline=math.ceil(settings.timeout * 1000),
            check=Check(send=settings.send, expect=settings.expect),
        )
        for _ in range(_KEPT_TUNNELS_TRIED):
            tunnel = pool.lease_idle(*peer) or await pool.lease(
                *peer, patience=patience.for_turn(), timeout=patience.left
            )
            is_kept = not tunnel.is_fresh
            try:
                await tunnel.open(request, b"", settings.timeout + _ON_THE_WAY)
                return  # an older sidecar took it for a connection, which is over now
            except ConnectionFailed as failure:
                if failure.reason is Reason.OK:
                    return
                if failure.reason is not Reason.TUNNEL_LOST or not is_kept:
                    raise
                pool.weed(*peer)  # the peer had hung up on a kept tunnel: that says nothing about the endpoint
            finally:
                pool.give_back(tunnel, reusable=tunnel.wire.idle)
        raise ConnectionFailed(Reason.TUNNEL_LOST, "the tunnels that stood are lost")


def _told(failure: ConnectionFailed) -> str:
    return f"{failure.reason}: {failure.detail}"


def _key(service: ServicePort) -> PortKey:
    return service.namespace, service.service, service.port
