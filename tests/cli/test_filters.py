"""Filters as logic: whatever the connections are, flags narrow, repeats widen and --not inverts."""

from hypothesis import given
from hypothesis import strategies as st

from meshnet.errors import Reason
from meshnet.model.connection import Connection, Direction, Peer, ReasonView, Security, State, TlsView
from meshnet_cli import filters
from meshnet_cli.filters import Filter, Predicate

NAMES = ("", "web", "api:8080", "db:5432", "a:b:1", "api")
IDENTITIES = ("", "spiffe://prod/ns/default/sa/web", "spiffe://prod/ns/x/sa/api", "nonsense")
ADDRESSES = ("", "10.0.0.1:80", "10.0.1.2:5432", "[fd00::1]:80", "10.0.0.1", "local", ":", "[::]", "10.0.0.1:99999")

peers = st.builds(
    Peer,
    address=st.sampled_from(ADDRESSES) | st.text(max_size=12),
    identity=st.sampled_from(IDENTITIES) | st.text(max_size=12),
    service=st.sampled_from(NAMES) | st.text(max_size=12),
)
connections = st.builds(
    Connection,
    id=st.text(max_size=8),
    direction=st.sampled_from(Direction),
    state=st.sampled_from(State),
    source=peers,
    destination=peers,
    original_destination=st.sampled_from(ADDRESSES),
    endpoint=st.sampled_from(ADDRESSES),
    tls=st.builds(TlsView, mode=st.sampled_from(Security), peer_identity=st.sampled_from(IDENTITIES)),
    policy=st.sampled_from(("", "default/deny-all")),
    bytes_sent=st.integers(0, 10**12),
    bytes_received=st.integers(0, 10**12),
    opened_at=st.sampled_from(("", "2026-01-02T03:04:05Z", "2026-01-02T03:04:05.123456789Z", "yesterday")),
    closed_at=st.sampled_from(("", "2026-01-02T03:05:00Z")),
    duration_ms=st.floats(0, 1e9),
    reason=st.none() | st.builds(ReasonView, code=st.sampled_from(Reason)),
)

who = st.sampled_from(
    ("web", "api", "10.0.0.0/8", "10.0.0.1", "fd00::/8", "10.0.0.1:80", "spiffe://prod/*", "*", "a*", "[")
)
predicates: st.SearchStrategy[Predicate] = st.one_of(
    st.builds(filters.client, who),
    st.builds(filters.server, who),
    st.builds(filters.peer, who),
    st.builds(filters.service, st.sampled_from(NAMES[1:])),
    st.builds(filters.port, st.sampled_from(("80", "5432"))),
    st.builds(filters.direction, st.sampled_from(("in", "out"))),
    st.builds(filters.state, st.sampled_from(State)),
    st.builds(filters.tls, st.sampled_from(Security)),
    st.builds(filters.identity, st.sampled_from(("*", "spiffe://*/web"))),
    st.builds(filters.policy, st.sampled_from(("*", "default/*", "x"))),
    st.builds(filters.reason, st.sampled_from(("*", "ok", "connect.*"))),
    st.builds(filters.min_age, st.sampled_from(("0s", "5m"))),
    st.builds(filters.min_bytes, st.integers(0, 10**12)),
    st.builds(filters.since, st.floats(0, 1e6), st.just("2026-01-02T03:06:00Z")),
    st.sampled_from((filters.is_open, filters.is_failed, filters.is_plain)),
)
groups = st.lists(st.lists(predicates, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple)


@given(connections)
def test_without_flags_everything_matches(connection: Connection) -> None:
    assert Filter()(connection)


@given(groups, predicates, connections)
def test_a_different_flag_never_shows_more(
    wanted: tuple[tuple[Predicate, ...], ...], more: Predicate, connection: Connection
) -> None:
    assert Filter((*wanted, (more,)))(connection) == (Filter(wanted)(connection) and more(connection))


@given(groups.filter(bool), predicates, connections)
def test_the_same_flag_again_never_shows_less(
    wanted: tuple[tuple[Predicate, ...], ...], more: Predicate, connection: Connection
) -> None:
    if Filter(wanted)(connection):
        assert Filter((*wanted[:-1], (*wanted[-1], more)))(connection)


@given(predicates, connections)
def test_not_shows_exactly_the_rest(predicate: Predicate, connection: Connection) -> None:
    assert Filter(unwanted=(predicate,))(connection) != Filter(((predicate,),))(connection)


@given(who, connections)
def test_peer_is_either_side(text: str, connection: Connection) -> None:
    either = filters.client(text)(connection) or filters.server(text)(connection)
    assert filters.peer(text)(connection) == either


@given(connections)
def test_every_connection_is_open_or_closed_or_failed(connection: Connection) -> None:
    closed = connection.state is State.CLOSED
    assert filters.is_open(connection) + filters.is_failed(connection) + closed == 1


@given(connections)
def test_a_name_is_never_taken_for_an_unnamed_peer(connection: Connection) -> None:
    if not connection.destination.service and not connection.destination.identity:
        assert not filters.server("*")(connection)
