"""What may be decided once for all connections to a service."""

import pytest

from meshnet.decide.breaker import BreakerState
from meshnet.decide.standing import endpoint_for_all
from meshnet.model.address import Address
from meshnet.model.service import Endpoint, Limits, Mode, ServicePort, Traffic, TunnelKind

ONE, OTHER = Endpoint(address=Address("10.0.0.1", 80)), Endpoint(address=Address("10.0.0.2", 80))
MESHED = Endpoint(address=Address("10.0.0.3", 80), tunnel=TunnelKind.MESHNET, identity="spiffe://x/ns/y/sa/z")
IDLE = Endpoint(address=Address("10.0.0.4", 80), weight=0)


def service(*endpoints: Endpoint, most_per_endpoint: int = 0) -> ServicePort:
    traffic = Traffic(limits=Limits(max_connections_per_endpoint=most_per_endpoint))
    return ServicePort(
        service="api", namespace="default", port=80, mode=Mode.PERMISSIVE, endpoints=endpoints, traffic=traffic
    )


def test_the_only_endpoint_is_everybodys() -> None:
    assert endpoint_for_all(service(ONE), None, BreakerState.CLOSED) is ONE


def test_also_where_it_is_reached_through_a_tunnel() -> None:
    assert endpoint_for_all(service(MESHED), None, BreakerState.CLOSED) is MESHED


def test_so_is_the_one_that_the_clients_named() -> None:
    assert endpoint_for_all(service(ONE, OTHER), OTHER, BreakerState.CLOSED) is OTHER


@pytest.mark.parametrize(
    ("to", "breaker"),
    [
        pytest.param(service(ONE, OTHER), BreakerState.CLOSED, id="each connection is a choice"),
        pytest.param(service(), BreakerState.CLOSED, id="there is none"),
        pytest.param(service(IDLE), BreakerState.CLOSED, id="it takes none"),
        pytest.param(service(ONE, most_per_endpoint=9), BreakerState.CLOSED, id="each is counted"),
        pytest.param(service(ONE), BreakerState.OPEN, id="nobody may try"),
        pytest.param(service(ONE), BreakerState.HALF_OPEN, id="one may try"),
    ],
)
def test_where_something_else_matters_each_is_decided(to: ServicePort, breaker: BreakerState) -> None:
    assert endpoint_for_all(to, None, breaker) is None
