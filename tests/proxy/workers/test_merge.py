"""How the answers of workers become one."""

import msgspec

from meshnet.errors import Reason
from meshnet.model.admin import (
    CertificateStatus,
    ConfigStatus,
    ConnectionList,
    ConnectionListMetadata,
    EndpointView,
    RelayStatus,
    Status,
    TunnelStatus,
    WorkerStatus,
)
from meshnet.model.connection import Connection, Direction, Peer, ReasonView, State
from meshnet.proxy.registry import choose
from meshnet.proxy.workers.merge import merge_endpoints, merge_lists, merge_status, parts_of

replace = msgspec.structs.replace


def connection(name: str, opened: int, closed: int = 0, direction: Direction = Direction.OUTBOUND) -> Connection:
    """Times in seconds of one minute."""
    return Connection(
        id=name,
        direction=direction,
        state=State.CLOSED if closed else State.OPEN,
        source=Peer(),
        destination=Peer(),
        opened_at=f"2026-01-02T03:04:{opened:02}.000Z",
        closed_at=f"2026-01-02T03:04:{closed:02}.000Z" if closed else "",
        reason=ReasonView(code=Reason.OK) if closed else None,
    )


def test_ended_ones_come_first_as_they_ended_and_open_ones_as_they_began() -> None:
    one = listed(connection("a", 1, 9), connection("c", 4, 11), connection("e", 3))
    other = listed(connection("b", 2, 10), connection("d", 1), connection("f", 5))
    assert [each.id for each in merge_lists([one, None, other]).items] == ["a", "b", "c", "d", "e", "f"]


def listed(*items: Connection, before: tuple[int, ...] = (), back: str = "", forgotten: int = 0) -> ConnectionList:
    metadata = ConnectionListMetadata(
        node="vm1",
        generated_at="2026-01-02T03:05:00.000Z",
        open=1,
        failed=2,
        plaintext=3,
        before=before,
        forgotten=forgotten,
        reaches_back=back,
    )
    return ConnectionList(metadata=metadata, items=items)


def test_the_next_part_is_asked_of_those_workers_that_have_more() -> None:
    lists = [listed(before=(3, 1)), listed(), None, listed(before=(0, 7))]
    before = merge_lists(lists).metadata.before
    assert parts_of(before, 4) == [(3, 1), (), (), (0, 7)]
    assert parts_of(before, 3) is None
    assert merge_lists([listed(), None]).metadata.before == ()


def test_of_several_memories_it_is_told_how_far_back_all_reach_and_how_much_none_has() -> None:
    early, late = "2026-01-02T03:00:00.000Z", "2026-01-02T03:01:00.000Z"
    told = merge_lists([listed(back=late, forgotten=4), listed(back=early, forgotten=5), listed()]).metadata
    assert (told.reaches_back, told.failed_reach_back, told.forgotten) == (late, "", 9)
    assert (told.open, told.failed, told.plaintext) == (3, 6, 9)


def test_of_one_id_the_one_that_got_it_here_is_chosen_else_the_newest() -> None:
    ours, theirs = connection("x", 1), connection("x", 2, direction=Direction.INBOUND)
    newer = connection("x", 3, direction=Direction.INBOUND)
    assert choose([theirs, ours]) is ours
    assert choose([theirs, newer]) is newer
    assert choose([]) is None


VIEW = EndpointView(
    service="api:80",
    endpoint="10.0.0.1:80",
    tunnel="none",
    identity="",
    weight=1,
    breaker="closed",
    connections=2,
    pending=1,
    failures=0,
)
OPEN = replace(VIEW, breaker="open", failures=5, open_for_seconds=3.0, last_error="connect.refused: so")
HALF_OPEN = replace(VIEW, breaker="half-open", failures=5, last_error="connect.refused: once")


def test_an_endpoint_has_the_connections_of_all_and_the_worst_breaker() -> None:
    (merged,) = merge_endpoints([[HALF_OPEN], [OPEN], [VIEW], [replace(OPEN, open_for_seconds=9.0)]])
    assert (merged.connections, merged.pending, merged.breaker, merged.workers) == (8, 4, "open", 2)
    assert (merged.open_for_seconds, merged.last_error) == (9.0, "connect.refused: so")
    (merged,) = merge_endpoints([[VIEW], [HALF_OPEN], [replace(VIEW, ejected_for_seconds=9.0)]])
    assert (merged.state, merged.workers) == ("ejected", 1)
    (merged,) = merge_endpoints([[VIEW], [replace(VIEW, last_error="once")]])
    assert (merged.breaker, merged.workers, merged.last_error) == ("closed", 2, "once")


def test_a_name_that_one_worker_cannot_resolve_is_told_and_names_without_an_address_stay_apart() -> None:
    known = replace(VIEW, dns_name="db.example.com")
    (merged,) = merge_endpoints([[known], [replace(known, dns_problem="SERVFAIL")]])
    assert (merged.endpoint, merged.dns_problem, merged.workers) == ("10.0.0.1:80", "SERVFAIL", 2)
    one, other = (replace(VIEW, endpoint="", dns_name=name) for name in ("one", "other"))
    assert [each.dns_name for each in merge_endpoints([[one, other], [one, other]])] == ["one", "other"]


def test_the_worst_of_what_workers_checks_say_is_told() -> None:
    failing = replace(VIEW, check="failing", check_error="connect.refused: so")
    (merged,) = merge_endpoints([[replace(VIEW, check="passing")], [failing], [replace(failing, check="panic")]])
    assert (merged.check, merged.check_error) == ("failing", "connect.refused: so")


def test_endpoints_of_different_services_stay_apart() -> None:
    other = replace(VIEW, service="db:80")
    assert [(each.service, each.workers) for each in merge_endpoints([[VIEW, other], [VIEW]])] == [
        ("api:80", 2),
        ("db:80", 1),
    ]


PARENT = Status(
    node="vm1",
    version="1",
    pid=1,
    uptime_seconds=9.0,
    ready=False,
    not_ready_because=(),
    draining=False,
    listeners={"outbound": "127.0.0.1:15101"},
    open_connections=0,
    opened_total=0,
    failed_total=0,
    certificate=CertificateStatus(),
    config=ConfigStatus(version=0, directory="d", services=0, policies=0, age_seconds=0.0),
    relay=RelayStatus(in_use=()),
    mark=7,
    gid=8,
)
WORKER = replace(
    PARENT,
    pid=2,
    ready=True,
    listeners={},
    open_connections=3,
    opened_total=10,
    failed_total=1,
    certificate=CertificateStatus(identity="spiffe://a", expires_in_seconds=100.0),
    config=ConfigStatus(version=4, directory="d", services=2, policies=1, age_seconds=5.0),
    relay=RelayStatus(in_use=("native",), not_in_use={"python": "native is faster"}),
    tunnels=(TunnelStatus(peer="p", idle=1, leased=2),),
)


def row(number: int, problem: str = "") -> WorkerStatus:
    return WorkerStatus(
        number=number, pid=number, ready=True, open_connections=3, deaths=0, uptime_seconds=1.0, problem=problem
    )


def test_a_status_is_that_of_all_with_what_is_the_parents_own() -> None:
    other = replace(
        WORKER,
        certificate=CertificateStatus(identity="spiffe://a", expires_in_seconds=50.0),
        config=ConfigStatus(version=3, directory="d", services=2, policies=1, age_seconds=9.0),
        tunnels=(TunnelStatus(peer="q", idle=1, leased=0), TunnelStatus(peer="p", idle=0, leased=1)),
    )
    merged = merge_status(PARENT, [row(1), row(2)], [WORKER, other])
    assert (merged.pid, merged.listeners, merged.mark, merged.gid) == (1, PARENT.listeners, 7, 8)
    assert (merged.ready, merged.not_ready_because) == (True, ())
    assert (merged.open_connections, merged.opened_total, merged.failed_total) == (6, 20, 2)
    assert merged.certificate is other.certificate
    assert merged.config is other.config
    assert merged.relay == WORKER.relay
    assert [(each.peer, each.idle, each.leased) for each in merged.tunnels] == [("p", 1, 3), ("q", 1, 0)]
    assert merged.workers == (row(1), row(2))


def test_what_keeps_one_from_being_ready_keeps_all_and_is_told_once() -> None:
    unready = replace(WORKER, ready=False, not_ready_because=("no mesh configuration yet",))
    merged = merge_status(PARENT, [row(1), row(2), row(3, "does not run")], [unready, unready])
    assert not merged.ready
    assert merged.not_ready_because == ("no mesh configuration yet", "worker 3 does not run")


def test_a_mesh_that_one_refused_is_told_though_another_is_further_behind() -> None:
    refused = replace(WORKER, config=replace(WORKER.config, version=9, problem="mesh.yaml:3: no"))
    assert merge_status(PARENT, [row(1), row(2)], [WORKER, refused]).config.problem == "mesh.yaml:3: no"


def test_in_a_drain_a_worker_that_has_ended_is_no_problem_of_its_own() -> None:
    going = replace(WORKER, ready=False, draining=True, not_ready_because=("draining",))
    merged = merge_status(replace(PARENT, draining=True), [row(1), row(2, "does not run")], [going])
    assert merged.not_ready_because == ("draining",)


def test_without_an_answer_the_parent_still_has_one() -> None:
    merged = merge_status(PARENT, [row(1, "does not run")], [])
    assert (merged.ready, merged.config, merged.certificate) == (False, PARENT.config, PARENT.certificate)
