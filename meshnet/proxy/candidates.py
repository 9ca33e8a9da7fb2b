"""Which of a service's endpoints may be tried now, and what is known of them: what the balancer asks."""

import enum
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from meshnet.decide.limits import below_endpoint_limit
from meshnet.decide.warmth import warmth
from meshnet.model.address import Address
from meshnet.model.connection import Weighed
from meshnet.model.service import Endpoint, ServicePort
from meshnet.proxy.state import ProxyState


class Out(enum.Enum):
    """Why an endpoint is not to be tried."""

    WEIGHT = enum.auto()
    CHECKS = enum.auto()
    BREAKER = enum.auto()
    EJECTED = enum.auto()
    LIMIT = enum.auto()
    TRIED = enum.auto()


DOUBTFUL = (Out.CHECKS, Out.EJECTED)
"""Those are tried all the same where there are no others."""

_WELL = (None, Out.LIMIT, Out.TRIED)
_WEIGHED = 8  # endpoints that are told; the balancer asks as many one by one, and of more two or so


class Candidates:
    """Of one connection, as of `now`; see meshnet.decide.balance.Load."""

    __slots__ = ("_asked", "_known", "_service", "_state", "_traffic", "failing", "now", "panics", "tried", "warming")

    def __init__(self, service: ServicePort, state: ProxyState, tried: set[Address], now: float) -> None:
        self._state, self._known, self._service, self._traffic = state, state.endpoints, service, service.traffic
        self.failing = state.checks.passed_over(service)
        self.tried, self.now = tried, now
        self.panics = False
        """Whether those that are ejected, or fail their checks, are taken all the same."""
        self.warming = bool(state.warming)
        self._asked: deque[Endpoint] = deque(maxlen=_WEIGHED)

    def out(self, endpoint: Endpoint, *, panics: bool = False) -> Out | None:
        """None if it may be tried. What is wrong with the endpoint itself comes first."""
        if not endpoint.weight:
            return Out.WEIGHT
        if self.failing and endpoint.address in self.failing and not panics:
            return Out.CHECKS
        known = self._known.get(endpoint.address)
        if known is not None:
            if not known.breaker.allows(self.now):
                return Out.BREAKER
            if known.outcomes.ejected_until > self.now and not panics:
                return Out.EJECTED
            if not below_endpoint_limit(self._traffic.limits, known.connections):
                return Out.LIMIT
        return Out.TRIED if self.tried and endpoint.address in self.tried else None

    def __call__(self, endpoint: Endpoint, /) -> int | None:
        self._asked.append(endpoint)
        return self.connections(endpoint) if self.out(endpoint, panics=self.panics) is None else None

    def connections(self, endpoint: Endpoint) -> int:
        known = self._known.get(endpoint.address)
        return 0 if known is None else known.connections

    def is_well(self, endpoint: Endpoint) -> bool:
        """Whether it has a share, passes its checks, and failures do not keep it from being tried."""
        return self.out(endpoint) in _WELL

    def well_were_tried(self, endpoints: Iterable[Endpoint]) -> bool:
        """Whether one that is well is out for this connection only."""
        return bool(self.tried) and any(each.address in self.tried and self.is_well(each) for each in endpoints)

    def weighed(self, endpoints: Sequence[Endpoint]) -> tuple[Weighed, ...]:
        """How they are at the moment of a choice: all, or of many those that were asked last. Of one there is none."""
        if len(endpoints) == 1:
            return ()
        told = endpoints if len(endpoints) <= _WEIGHED else {each.address: each for each in self._asked}.values()
        return tuple([self._weighed(each) for each in told])

    def _weighed(self, endpoint: Endpoint) -> Weighed:
        name, connections = endpoint.name, self.connections(endpoint)
        if (out := self.out(endpoint)) is None:
            return Weighed(endpoint=name, connections=connections, score=self.score(endpoint, connections))
        taken = self.panics and self.out(endpoint, panics=True) is None
        score = self.score(endpoint, connections) if taken else None
        return Weighed(endpoint=name, connections=connections, score=score, why_not=self.in_words(endpoint, out))

    def score(self, endpoint: Endpoint, connections: int) -> float:
        """What least_conn goes by."""
        weight = endpoint.weight * self.warmth(endpoint) if self.warming else endpoint.weight
        return round((connections + 1) / weight, 6)

    def warmth(self, endpoint: Endpoint, /) -> float:
        since = self._state.warming.get(endpoint.address)
        if since is None:
            return 1.0
        found = warmth(self._traffic.slow_start, self.now - since)
        if found >= 1.0:
            del self._state.warming[endpoint.address]
        return found

    def connect_time(self, endpoint: Endpoint, /) -> float | None:
        known = self._known.get(endpoint.address)
        return known.connect_time.seconds if known is not None else None

    def passed_over(self, endpoints: Iterable[Endpoint], most: int) -> Iterator[str]:
        """Of those that were not tried, at most so many, each with why not."""
        untried = (each for each in endpoints if each.address not in self.tried)
        told = ((each, out) for each in untried if (out := self.out(each)) is not None)
        return (f"{each.name}: {self.in_words(each, out)}" for each, out in islice(told, most))

    def in_words(self, endpoint: Endpoint, out: Out) -> str:
        """Why it is out."""
        match out:
            case Out.WEIGHT:
                return "its weight is 0"
            case Out.CHECKS:
                return f"its checks fail: {self._state.checks.view(self._service, endpoint)[1]}"
            case Out.BREAKER:
                return f"its breaker is open for {self._known[endpoint.address].breaker.open_for(self.now):.1f} s more"
            case Out.EJECTED:
                left = self._known[endpoint.address].outcomes.ejected_until - self.now
                return f"it is ejected for {left:.1f} s more"
            case Out.LIMIT:
                return f"it has {self._known[endpoint.address].connections} connections, its limit"
            case Out.TRIED:
                return "it was tried"
