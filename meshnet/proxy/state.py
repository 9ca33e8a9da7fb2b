"""The only mutable object of a sidecar: what it knows, and what it has in hand."""

import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from meshnet.decide.access import AccessRules, Call, Deny
from meshnet.decide.balance import Balancer
from meshnet.decide.breaker import Breaker
from meshnet.decide.limits import Admitted, Limiter, Rejected, Ticket
from meshnet.decide.retry import RetryBudget
from meshnet.errors import ConnectionFailed, EndedBy, Reason
from meshnet.model.address import Address
from meshnet.model.service import Endpoint, Mode, ServicePort
from meshnet.model.settings import Settings
from meshnet.model.snapshot import Snapshot
from meshnet.net.addresses import LocalAddresses
from meshnet.net.strand import in_task
from meshnet.proxy.identity import Identity
from meshnet.proxy.metrics import Metrics
from meshnet.proxy.registry import Registry
from meshnet.relay import Relays
from meshnet.tunnel.pool import Pool

if TYPE_CHECKING:
    from meshnet.proxy.inbound import ServedTunnel

_LOCAL_SERVICES_KEPT = 5.0  # seconds; an address can come and go with its interface


@dataclass(slots=True)
class EndpointState:
    """What this proxy has learned of one endpoint. It outlives config pushes."""

    breaker: Breaker
    open: int = 0
    pending: int = 0
    last_error: str = ""


@dataclass(slots=True)
class ServiceState:
    """What this proxy holds for one service: its limits and who waits for them."""

    limiter: Limiter
    budget: RetryBudget = field(default_factory=RetryBudget)
    waiting: dict[Ticket, trio.Event] = field(default_factory=dict)


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
        self.services: dict[tuple[str, str], ServiceState] = {}  # by namespace and name
        self.endpoints: dict[Address, EndpointState] = {}
        self._balancers: dict[str, Balancer] = {}  # by the name of a service port
        self._local_services: dict[int, tuple[float, ServicePort | None]] = {}  # by the application's port
        self.snapshot = snapshot
        self.applied_at = time.monotonic()
        self.config_problem = ""
        self.access = AccessRules(snapshot.policies, snapshot.default_action)
        self.draining = False
        self.tunnels: set[ServedTunnel] = set()  # that peers have opened to us

    def apply(self, snapshot: Snapshot) -> None:
        """Puts a new snapshot in force. Nothing that is open ends, but for what access now denies."""
        self.snapshot = snapshot
        self.applied_at = time.monotonic()
        self.config_problem = ""
        self.access = AccessRules(snapshot.policies, snapshot.default_action)
        self._local_services.clear()
        now = time.monotonic()
        for service in snapshot.services:
            if held := self.services.get((service.namespace, service.service)):
                held.limiter.settings = service.traffic.limits
                self._wake(held, held.limiter.changed(now))
            for endpoint in service.endpoints:
                if known := self.endpoints.get(endpoint.address):
                    known.breaker.settings = service.traffic.breaker
        gone = self.endpoints.keys() - snapshot.by_endpoint.keys()
        for address in gone:
            if not self.endpoints[address].open and not self.endpoints[address].pending:
                del self.endpoints[address]
        self.review()

    def need_mesh(self) -> None:
        """Raises ConnectionFailed(config.none) while it is not known what is meshed and who may call."""
        if self.snapshot.version == 0:
            raise ConnectionFailed(Reason.CONFIG_NONE, self.config_problem or "the mesh files have not been read yet")

    def review(self) -> None:
        """Asks access again of every connection that it once let in."""
        for record in list(self.registry.open.values()):
            if record.call is None:
                continue
            verdict = self.access.decide(record.call)
            if isinstance(verdict, Deny):
                record.abort(
                    Reason.AUTHZ_REVOKED, EndedBy.POLICY, f"{verdict.by} no longer allows it", policy=verdict.by
                )

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
        return self._balancers.get(service.name) or self._balancers.setdefault(service.name, Balancer())

    def endpoint(self, endpoint: Endpoint, service: ServicePort) -> EndpointState:
        known = self.endpoints.get(endpoint.address)
        if known is None:
            known = self.endpoints[endpoint.address] = EndpointState(Breaker(service.traffic.breaker))
        return known

    def service(self, service: ServicePort) -> ServiceState:
        key = (service.namespace, service.service)
        held = self.services.get(key)
        if held is None:
            held = self.services[key] = ServiceState(Limiter(service.traffic.limits))
        return held

    async def enter(self, held: ServiceState) -> float | None:
        """Takes one of the service's connections, in turn. The seconds it had to wait, None if it had not.

        Raises ConnectionFailed(limit.*). Whoever returns from here owes one `leave`.
        """
        started = time.monotonic()
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

    def leave(self, held: ServiceState) -> None:
        self._wake(held, held.limiter.leave(time.monotonic()))

    def is_local(self, host: str) -> bool:
        return host in self.addresses

    def _local_service(self, port: int) -> ServicePort | None:
        for address, (service, _) in self.snapshot.by_endpoint.items():
            if address.port == port and self.is_local(address.host):
                return service
        return None

    def _wake(self, held: ServiceState, admitted: list[Ticket]) -> None:
        for ticket in admitted:
            held.waiting[ticket].set()
