from hypothesis import given
from hypothesis import strategies as st

from meshnet.decide.route import Passthrough, Refuse, Route, ToService, route
from meshnet.errors import Reason
from meshnet.model.address import Address
from meshnet.model.service import Endpoint, Mode, ServicePort
from meshnet.model.snapshot import Snapshot

VIRTUAL = Address("10.96.0.10", 5432)
FIRST = Endpoint(address=Address("10.0.0.1", 5433))
SECOND = Endpoint(address=Address("10.0.0.2", 5433))
DATABASE = ServicePort(service="db", namespace="prod", port=5432, mode=Mode.STRICT, endpoints=(FIRST, SECOND))
SNAPSHOT = Snapshot(
    version=1,
    services=(DATABASE,),
    by_address={VIRTUAL: DATABASE},
    by_endpoint={endpoint.address: (DATABASE, endpoint) for endpoint in DATABASE.endpoints},
)
OWN_PORTS = frozenset({15101, 15106, 15108})


def test_a_service_address_goes_to_any_endpoint_of_the_service() -> None:
    assert route(SNAPSHOT, VIRTUAL, OWN_PORTS, False) == ToService(DATABASE, pinned=None)


def test_an_endpoint_named_by_the_client_is_pinned() -> None:
    assert route(SNAPSHOT, SECOND.address, OWN_PORTS, False) == ToService(DATABASE, pinned=SECOND)


def test_a_service_address_wins_over_an_endpoint_with_the_same_address() -> None:
    both = Snapshot(version=1, by_address={FIRST.address: DATABASE}, by_endpoint={FIRST.address: (DATABASE, FIRST)})
    assert route(both, FIRST.address, OWN_PORTS, False) == ToService(DATABASE, pinned=None)


def test_another_port_of_a_known_host_is_not_in_the_mesh() -> None:
    assert route(SNAPSHOT, Address(VIRTUAL.host, 22), OWN_PORTS, False) == Passthrough()


def test_the_sidecars_own_port_on_a_local_address_is_a_loop() -> None:
    decision = route(SNAPSHOT, Address("127.0.0.1", 15101), OWN_PORTS, True)
    assert isinstance(decision, Refuse)
    assert decision.reason is Reason.LOOP
    assert "127.0.0.1:15101" in decision.detail


def test_a_loop_is_refused_even_if_a_service_claims_the_address() -> None:
    mine = Address("10.0.0.9", 15106)
    claimed = Snapshot(version=1, by_address={mine: DATABASE})
    assert isinstance(route(claimed, mine, OWN_PORTS, True), Refuse)


def test_the_same_port_number_on_another_host_is_not_a_loop() -> None:
    assert route(SNAPSHOT, Address("192.0.2.1", 15101), OWN_PORTS, False) == Passthrough()


ADDRESSES = st.builds(
    Address, st.sampled_from(["10.0.0.1", "10.0.0.2", "10.96.0.10", "::1"]), st.sampled_from([80, 81])
)


@given(st.sets(ADDRESSES), st.sets(ADDRESSES), ADDRESSES, st.frozensets(st.sampled_from([80, 81])), st.booleans())
def test_route_is_the_first_of_loop_service_endpoint_passthrough(
    services: set[Address], endpoints: set[Address], to: Address, own_ports: frozenset[int], is_local: bool
) -> None:
    snapshot = Snapshot(
        version=1,
        by_address=dict.fromkeys(services, DATABASE),
        by_endpoint={address: (DATABASE, Endpoint(address=address)) for address in endpoints},
    )
    decision: Route = route(snapshot, to, own_ports, is_local)
    if is_local and to.port in own_ports:
        assert isinstance(decision, Refuse)
    elif to in services:
        assert decision == ToService(DATABASE)
    elif to in endpoints:
        assert decision == ToService(DATABASE, Endpoint(address=to))
    else:
        assert decision == Passthrough()
