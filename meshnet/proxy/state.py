"""The only mutable object of a sidecar: what it knows, and what it has in hand."""

import logging
import random
import socket
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import trio

from meshnet.decide.access import AccessRules, Call, Deny
from meshnet.decide.balance import Balancer, Prepared, prepare
from meshnet.decide.breaker import Breaker, BreakerState
from meshnet.decide.limits import Admitted, Limiter, Queued, Rejected, Ticket
from meshnet.decide.names import nameless
from meshnet.decide.outlier import Outcomes
from meshnet.decide.resets import ResetsAtOnce
from meshnet.decide.retry import RetryBudget
from meshnet.decide.warmth import ConnectTime
from meshnet.errors import ConnectionFailed, EndedBy, Reason
from meshnet.model.address import Address, parse_address
from meshnet.model.connection import Direction
from meshnet.model.service import Balance, Endpoint, Limits, Locality, Mode, OnEject, ServicePort, TunnelKind
from meshnet.model.settings import Settings
from meshnet.model.snapshot import Snapshot
from meshnet.net.addresses import LocalAddresses
from meshnet.net.strand import in_task
from meshnet.proxy.arrivals import Arrivals
from meshnet.proxy.checks import Checks
from meshnet.proxy.held import HeldSyns
from meshnet.proxy.identity import Identity
from meshnet.proxy.metrics import Metrics
from meshnet.proxy.names import Names
from meshnet.proxy.orders import Orders
from meshnet.proxy.record import Record
from meshnet.proxy.registry import Registry
from meshnet.proxy.slices import gently, let_go, slices
from meshnet.proxy.standing_order import StandingOrder
from meshnet.relay import Relays
from meshnet.tunnel.pool import Pool

if TYPE_CHECKING:
    from meshnet.proxy.inbound import ServedTunnel

ServiceKey = tuple[str, str]
"""Namespace and name."""

_log = logging.getLogger("meshnet.proxy")

_PANIC_SAID_EVERY = 60.0
_LOCAL_SERVICES_KEPT = 5.0  # seconds; an address can come and go with its interface
_GONE_KEPT = 1024  # endpoints that are not in the mesh any more, and may be back before what they did is forgiven


@dataclass(slots=True)
class EndpointState:
    """What this proxy has learned of one endpoint. It outlives config pushes."""

    breaker: Breaker
    open: int = 0
    pending: int = 0
    last_error: str = ""
    orders: set[StandingOrder] = field(default_factory=set)
    outcomes: Outcomes = field(default_factory=Outcomes)
    connect_time: ConnectTime = field(default_factory=ConnectTime)
    resets: ResetsAtOnce = field(default_factory=ResetsAtOnce)

    @property
    def connections(self) -> int:
        """As it is now: the relay tells late of what orders begin and end."""
        return self.open + self.pending + sum(order.unheard() for order in self.orders)

    @property
    def lasts_until(self) -> float:
        """Until when something in it has the endpoint treated otherwise than a new one, now or once it fails again."""
        return max(self.breaker.lasts_until, self.outcomes.lasts_until)


@dataclass(slots=True)
class ServiceState:
    """What this proxy holds for one service: its limits and who waits for them."""

    limiter: Limiter
    budget: RetryBudget = field(default_factory=RetryBudget)
    waiting: dict[Ticket, trio.Event] = field(default_factory=dict)
    orders: set[StandingOrder] = field(default_factory=set)  # which have places of the limits
    panicked_at: float = float("-inf")  # when ejected endpoints were last used, for want of others


class ProxyState:
    def __init__(
        self,
        settings: Settings,
        snapshot: Snapshot,
        *,
        identity: Identity,
        metrics: Metrics,
        registry: Registry,
        relays: Relays,
        pool: Pool,
        addresses: LocalAddresses,
        mark: int,
    ) -> None:
        self.settings = settings
        self.own_ports = settings.own_ports()
        self.identity = identity
        self.metrics = metrics
        self.registry = registry
        self.relays = relays
        self.pool = pool
        self.addresses = addresses
        self.mark = mark
        self.dice = random.Random()
        self.services: dict[ServiceKey, ServiceState] = {}
        self.here = Locality(zone=settings.proxy.zone, region=settings.proxy.region)
        self.endpoints: dict[Address, EndpointState] = {}
        self.warming: dict[Address, float] = {}  # since when an endpoint is there, or there again; in force soon
        self.gone: set[Address] = set()  # of `endpoints`, those that are not in the mesh any more
        # Endpoints that are gone, by name, and until when their connections may live.
        self.removed: dict[str, tuple[Address, float]] = {}
        self._balancers: dict[tuple[str, str, int], Balancer] = {}  # by namespace and name of the service, and port
        self._local_services: dict[int, tuple[float, ServicePort | None]] = {}  # by the application's port
        self.snapshot = snapshot
        self.applied_at = time.monotonic()
        self.config_problem = ""
        self.access = AccessRules(snapshot.policies, snapshot.default_action)
        self.orders = Orders(self)
        self.names = Names(settings.mesh, mark)
        self.checks = Checks(self)
        addresses.on_change = self._addresses_changed
        # Where capture.truthful_connect asks for it: those whose SYN waits for a leg.
        self.held = HeldSyns(settings) if settings.capture.truthful_connect else None
        # Takes who asks for it through the rules; whoever answers for all processes takes the place of this.
        self.answer_readiness: Callable[[socket.socket], None] = socket.socket.close
        self.draining = False
        self.arrivals = Arrivals()
        self.tunnels: set[ServedTunnel] = set()  # that peers have opened to us

    def speaks_as(self, client: Address) -> str:
        """The address that an application sees of `client`; empty for our own, by which a client of this host comes."""
        asked = self.settings.capture.original_source and client.host not in self.addresses
        # A link-local address is of one link, which is not told of it.
        return client.host if asked and not client.host.startswith(("fe80:", "169.254.")) else ""

    async def apply(self, snapshot: Snapshot) -> None:
        """Puts a new snapshot in force, all of it at once. Nothing that is open ends, but for what access now denies.

        When it returns, those have ended, and what is gone is forgotten. Other tasks run meanwhile; calls must not
        overlap.
        """
        compiled = await trio.to_thread.run_sync(_compiled, snapshot, self.snapshot, self.here)
        access, limits = compiled.access, compiled.limits
        self.snapshot = snapshot
        self.applied_at = time.monotonic()
        for service, prepared in compiled.prepared:
            self.balancer(service).adopt(prepared)
        self.warming |= dict.fromkeys(compiled.added, self.applied_at)
        for address in self.gone:
            if address in self.warming:  # it is back, and may be ejected still
                self.warming[address] = max(self.applied_at, self.endpoints[address].outcomes.ejected_until)
        self.removed = {
            name: (address, until)
            for name, (address, until) in self.removed.items()
            if address not in snapshot.by_endpoint
        }
        for endpoint, seconds in compiled.removed:
            self.removed.setdefault(endpoint.name, (endpoint.address, self.applied_at + seconds))
        self.access = access
        self.orders.suspend_all()
        self._local_services.clear()
        for key, held in self.services.items():
            if (new := limits.get(key)) is not None and new is not held.limiter.settings:
                held.limiter.settings = new
                self._wake(held, held.limiter.changed(self.applied_at))
        await self._review()
        await self.orders.revoke_suspended()
        await self.checks.follow(snapshot.services)
        await self._forget(limits.keys(), snapshot)
        await let_go(compiled.parts)

    def need_mesh(self) -> None:
        """Raises ConnectionFailed(config.none) while it is not known what is meshed and who may call."""
        if self.snapshot.version == 0:
            raise ConnectionFailed(Reason.CONFIG_NONE, self.config_problem or "the mesh files have not been read yet")

    def check(self, call: Call) -> str:
        """The name of the policy that allows `call`. Raises ConnectionFailed(authz.denied)."""
        verdict = self.access.decide(call)
        if isinstance(verdict, Deny):
            raise ConnectionFailed(
                Reason.AUTHZ_DENIED,
                f"{call.identity or call.address} may not call port {call.port}: {verdict.by}",
                ended_by=EndedBy.POLICY,
                policy=verdict.by,
            )
        return verdict.by

    def service_at(self, target: Address) -> ServicePort | None:
        """The service that an application of this host belongs to.

        An application mostly listens on every address of its host, of which the mesh names one. Called on another
        one, it still belongs to its service: no caller gets past the service's policies that way.
        """
        if (found := self.snapshot.by_endpoint.get(target)) is not None:
            return found[0]
        now = time.monotonic()
        known = self._local_services.get(target.port)
        if known is None or known[0] < now:
            if len(self._local_services) > 1024:
                self._local_services.clear()
            known = self._local_services[target.port] = (now + _LOCAL_SERVICES_KEPT, self._local_service(target.port))
        return known[1]

    def mode_of(self, service: ServicePort | None) -> Mode:
        return self.snapshot.mode if service is None else service.mode

    def balancer(self, service: ServicePort) -> Balancer:
        key = (service.namespace, service.service, service.port)
        return self._balancers.get(key) or self._balancers.setdefault(key, Balancer())

    def endpoint(self, endpoint: Endpoint, service: ServicePort) -> EndpointState:
        """What is known of it, from now on by the settings of `service`."""
        known = self.endpoints.get(endpoint.address)
        if known is None:
            known = self.endpoints[endpoint.address] = EndpointState(Breaker(service.traffic.breaker))
        known.breaker.settings = service.traffic.breaker
        return known

    def service(self, service: ServicePort) -> ServiceState:
        key = (service.namespace, service.service)
        held = self.services.get(key)
        if held is None:
            held = self.services[key] = ServiceState(Limiter(service.traffic.limits))
        return held

    def panicked(self, service: ServicePort, now: float) -> None:
        """Endpoints of it that are ejected or fail their checks are used, for want of others."""
        held = self.service(service)
        if now - held.panicked_at > _PANIC_SAID_EVERY:
            _log.warning(
                "%s has no endpoint left that is well: those that are ejected or fail checks are used", service.name
            )
        held.panicked_at = now

    def blamed(self, service: ServicePort, endpoint: Endpoint, known: EndpointState, now: float) -> None:
        """A failure has counted against it: if that has opened its breaker, policy may want what is open to end."""
        if service.traffic.on_eject is OnEject.CLOSE and known.breaker.state(now) is BreakerState.OPEN:
            self.close_endpoint(endpoint, "its breaker has opened")

    def ended(self, record: Record, known: EndpointState) -> None:
        """A connection to that endpoint: it may be the one by which somebody learns that it is declared wrongly."""
        if record.connected is None or record.ended is None or record.reason is None:
            return
        seconds, round_trip = record.ended - record.connected, known.connect_time.seconds or 0.0
        if not known.resets.note(record.reason, record.ended_by, record.tally.received, seconds, round_trip):
            return
        service, endpoint = self.snapshot.by_endpoint.get(parse_address(record.endpoint), (None, None))
        if service is None or endpoint is None or endpoint.tunnel is not TunnelKind.NONE:
            return
        if not self.is_local(endpoint.address.host):
            known.last_error = f"{Reason.PEER_RST}: it accepts and resets at once; a sidecar without its application?"
            _log.warning(
                "%s of %s accepts connections and resets each at once, without a byte: its application does so, or "
                "there is a sidecar that cannot reach it. If that host is in the mesh, declare the endpoint so "
                "(tunnel: meshnet, and its identity)",
                *(record.endpoint, service.name),
            )

    def close_endpoint(self, endpoint: Endpoint, why: str) -> None:
        """Ends what is open to it: its caller finds another one."""
        self.registry.catch_up()
        for record in list(self.registry.open.values()):
            if record.endpoint == endpoint.name and record.direction is Direction.OUTBOUND:
                record.abort(Reason.ENDPOINT_EJECTED, EndedBy.POLICY, f"{endpoint.name}: {why}")

    async def enter(self, held: ServiceState) -> float | None:
        """Takes one of the service's connections, in turn. The seconds it had to wait, None if it had not.

        Raises ConnectionFailed(limit.*). Whoever returns from here owes one `leave`.
        """
        started = time.monotonic()
        outcome = held.limiter.enter(started)
        if not isinstance(outcome, Admitted) and held.orders:
            if isinstance(outcome, Queued):
                held.limiter.give_up(outcome.ticket, started)
            self.orders.revoke(held.orders)  # and with them the places that they do not use
            outcome = held.limiter.enter(started)
        if isinstance(outcome, Admitted):
            return None
        if isinstance(outcome, Rejected):
            raise ConnectionFailed(outcome.reason, "the queue is full", ended_by=EndedBy.LIMIT)
        admitted = held.waiting[outcome.ticket] = trio.Event()
        entered = False
        try:
            await in_task()
            with trio.move_on_at(trio.current_time() + outcome.deadline - started):
                await admitted.wait()
            entered = admitted.is_set()
        finally:
            del held.waiting[outcome.ticket]
            if not entered:
                self._wake(held, held.limiter.give_up(outcome.ticket, time.monotonic()))
        if not entered:
            waited = held.limiter.settings.queue_timeout
            raise ConnectionFailed(
                Reason.LIMIT_QUEUE_TIMEOUT, f"no free connection within {waited:g} s", ended_by=EndedBy.LIMIT
            )
        return time.monotonic() - started

    def leave(self, held: ServiceState, connections: int = 1) -> None:
        self._wake(held, held.limiter.leave(time.monotonic(), connections))

    def is_local(self, host: str) -> bool:
        return host in self.addresses

    def _addresses_changed(self) -> None:
        """What was another host's may be ours now, and an application here another service's."""
        self._local_services.clear()
        self.orders.suspend_all()

    def review(self, record: Record) -> None:
        """Ends a connection that access would not let in now."""
        if record.call is None:
            return
        verdict = self.access.decide(record.call)
        if isinstance(verdict, Deny):
            record.abort(Reason.AUTHZ_REVOKED, EndedBy.POLICY, f"{verdict.by} no longer allows it", policy=verdict.by)

    async def _review(self) -> None:
        """Asks access again of every connection that it once let in; who has come since was asked by it anyway."""
        self.registry.catch_up()
        for records in slices(self.registry.open.values()):
            for record in records:
                self.review(record)
            await trio.lowlevel.checkpoint()

    async def _forget(self, services: Collection[ServiceKey], snapshot: Snapshot) -> None:
        """What was known of services and endpoints that are gone, unless a connection has to do with them still."""
        for keys in slices(self.services):
            for key in keys:
                held = self.services[key]
                if key not in services and not held.limiter.open and not held.waiting:
                    del self.services[key]
            await trio.lowlevel.checkpoint()
        for ports in slices(self._balancers):
            for port in ports:
                if port[:2] not in services:
                    del self._balancers[port]
            await trio.lowlevel.checkpoint()
        for addresses in slices(self.endpoints):
            self.gone.update(address for address in addresses if address not in snapshot.by_endpoint)
            await trio.lowlevel.checkpoint()
        await self.forget_gone(self.applied_at)
        self.warming = {address: since for address, since in self.warming.items() if address in snapshot.by_endpoint}

    async def forget_gone(self, now: float) -> None:
        """What was known of endpoints that are gone: while a breaker or an ejection lasts they may come back to it."""
        kept = 0
        for addresses in slices(self.gone):
            for address in addresses:
                known = self.endpoints.get(address)
                if known is None or address in self.snapshot.by_endpoint:
                    self.gone.discard(address)
                elif known.open or known.pending:
                    continue
                elif known.lasts_until > now and kept < _GONE_KEPT:
                    kept += 1
                else:
                    del self.endpoints[address]
                    self.gone.discard(address)
            await trio.lowlevel.checkpoint()

    def _local_service(self, port: int) -> ServicePort | None:
        for address, (service, _) in self.snapshot.by_endpoint.items():
            if address.port == port and self.is_local(address.host):
                return service
        # A name that nobody could resolve yet may be this host's: nobody gets past its service's policies that way.
        for service in self.snapshot.services:
            if service.named and service.named[0].port == port and nameless(service):
                return service
        return None

    def _wake(self, held: ServiceState, admitted: list[Ticket]) -> None:
        for ticket in admitted:
            held.waiting[ticket].set()


class _Compiled(NamedTuple):
    access: AccessRules
    limits: dict[ServiceKey, Limits]
    prepared: list[tuple[ServicePort, Prepared]]
    added: list[Address]
    """Endpoints that are new beside others, which are not."""
    removed: list[tuple[Endpoint, float]]
    """Those that are gone, and the seconds their connections get, where they get some."""
    parts: list[object]
    """Of the snapshot before, the smallest first, so that none of it goes with a greater one."""


def _compiled(snapshot: Snapshot, before: Snapshot, here: Locality) -> _Compiled:
    """What takes long of a snapshot that is not in force yet."""
    limits = {(service.namespace, service.service): service.traffic.limits for service in snapshot.services}
    prepared = [
        (service, prepare(service.traffic, service.endpoints, here))
        for service in snapshot.services
        if service.traffic.balance is Balance.MAGLEV
    ]
    added = []
    for service in gently(snapshot.services):
        new = [each.address for each in service.endpoints if each.address not in before.by_endpoint]
        if len(new) < len(service.endpoints):  # or there is nobody to take the rest meanwhile
            added += new
    removed = [
        (endpoint, service.traffic.timeouts.removed)
        for address, (service, endpoint) in before.by_endpoint.items()
        if service.traffic.timeouts.removed and address not in snapshot.by_endpoint
    ]
    parts: list[object] = [endpoint for service in before.services for endpoint in service.endpoints]
    parts += [*before.by_address, *before.by_endpoint.values(), *before.services]
    return _Compiled(AccessRules(snapshot.policies, snapshot.default_action), limits, prepared, added, removed, parts)
