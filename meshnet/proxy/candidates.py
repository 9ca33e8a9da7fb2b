"""Which of a service's endpoints may be tried now, and what is known of them: what the balancer asks."""

from collections.abc import Iterable, Iterator
from itertools import islice

from meshnet.decide.limits import below_endpoint_limit
from meshnet.decide.warmth import warmth
from meshnet.model.address import Address
from meshnet.model.service import Endpoint, ServicePort
from meshnet.proxy.state import ProxyState


class Candidates:
    """Of one connection, as of `now`; see meshnet.decide.balance.Load."""

    __slots__ = ("_known", "_service", "_state", "_traffic", "failing", "now", "panics", "tried", "warming")

    def __init__(self, service: ServicePort, state: ProxyState, tried: set[Address], now: float) -> None:
        self._state, self._known, self._service, self._traffic = state, state.endpoints, service, service.traffic
        self.failing = state.checks.passed_over(service)
        self.tried, self.now = tried, now
        self.panics = False
        """Whether those that are ejected, or fail their checks, are taken all the same."""
        self.warming = bool(state.warming)

    def __call__(self, endpoint: Endpoint, /) -> int | None:
        """None: its checks fail, its breaker is open, it is ejected, at its own limit, or was tried before."""
        if self.failing and endpoint.address in self.failing and not self.panics:
            return None
        known = self._known.get(endpoint.address)
        if known is None:
            return 0
        connections, now = known.connections, self.now
        if not known.breaker.allows(now) or not below_endpoint_limit(self._traffic.limits, connections):
            return None
        if known.outcomes.ejected_until > now and not self.panics:
            return None
        return None if self.tried and endpoint.address in self.tried else connections

    def is_well(self, endpoint: Endpoint) -> bool:
        """Whether it has a share, passes its checks, and failures do not keep it from being tried."""
        known = self._known.get(endpoint.address)
        if not endpoint.weight or endpoint.address in self.failing:
            return False
        return known is None or (known.breaker.allows(self.now) and not known.outcomes.is_ejected(self.now))

    def well_were_tried(self, endpoints: Iterable[Endpoint]) -> bool:
        """Whether one that is well is out for this connection only."""
        return bool(self.tried) and any(each.address in self.tried and self.is_well(each) for each in endpoints)

    def warmth(self, endpoint: Endpoint, /) -> float:
        since = self._state.warming.get(endpoint.address)
        if since is None:
            return 1.0
        found = warmth(self._traffic.slow_start, self.now - since)
        if found >= 1.0:
            del self._state.warming[endpoint.address]
        return found

    def connect_time(self, endpoint: Endpoint, /) -> float:
        known = self._known.get(endpoint.address)
        return known.connect_time.seconds if known is not None else 0.0

    def passed_over(self, endpoints: Iterable[Endpoint], most: int) -> Iterator[str]:
        """Of those that were not tried, at most so many, each with why not."""
        untried = (each for each in endpoints if each.address not in self.tried)
        told = ((each, why) for each in untried if (why := self.why_not(each)))
        return (f"{each.name}: {why}" for each, why in islice(told, most))

    def why_not(self, endpoint: Endpoint) -> str:
        """In words; empty if it may be tried."""
        known = self._known.get(endpoint.address)
        if not endpoint.weight:
            return "its weight is 0"
        if endpoint.address in self.failing:
            return f"its checks fail: {self._state.checks.view(self._service, endpoint)[1]}"
        if known is None:
            return ""
        if not known.breaker.allows(self.now):
            return f"its breaker is open for {known.breaker.open_for(self.now):.1f} s more"
        if (left := known.outcomes.ejected_until - self.now) > 0:
            return f"it is ejected for {left:.1f} s more"
        if not below_endpoint_limit(self._traffic.limits, known.connections):
            return f"it has {known.connections} connections, its limit"
        return "it was tried" if endpoint.address in self.tried else ""
