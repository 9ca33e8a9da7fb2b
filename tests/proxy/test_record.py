"""One record by itself: its id, its end, and what it lets through."""

import socket

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from meshnet.errors import ConnectionFailed, EndedBy, Phase, Reason
from meshnet.model.address import Address
from meshnet.model.connection import Direction, State
from meshnet.proxy.record import Record, new_id, number_in_letters
from meshnet.proxy.registry import Registry
from meshnet.relay import Outcome
from tests.produced import note

SOURCE = Address("10.0.0.1", 1234)
DAY = 86400.0
WRAP = 2**31 / 1000  # seconds after which ids begin anew


class Nobody:
    def ended(self, record: Record) -> None:
        pass


def registry() -> Registry:
    return Registry(memory=1 << 20, observer=Nobody(), log=None)


def record() -> Record:
    return registry().life(Direction.OUTBOUND, SOURCE, None)


@given(st.floats(0, 50 * 365 * DAY), st.floats(0.002, DAY))
def test_a_later_id_sorts_behind_an_earlier_one(wall: float, later: float) -> None:
    first, second = new_id(wall), new_id(wall + later)
    assert len(first) == len(second) == 8
    if wall // WRAP == (wall + later) // WRAP:
        assert first < second


def test_ids_of_one_millisecond_are_different() -> None:
    assert len({new_id(1e9) for _ in range(256)}) == 256


def test_what_workers_put_behind_their_ids_is_different_for_each_and_short() -> None:
    suffixes = [number_in_letters(number) for number in range(1, 65)]
    assert len(set(suffixes)) == 64
    assert (suffixes[0], suffixes[30], suffixes[31], suffixes[63]) == ("1", "z", "10", "20")


def test_an_id_from_here_ends_as_the_registry_says_and_a_peers_is_left_alone() -> None:
    worker = Registry(memory=1 << 20, observer=Nobody(), log=None, id_suffix="2")
    ours = worker.life(Direction.OUTBOUND, SOURCE, None).id
    assert (len(ours), ours[8:]) == (9, "2")
    assert worker.life(Direction.INBOUND, SOURCE, None, "k7f2").id == "k7f2"


def test_no_letter_of_an_id_looks_like_a_digit() -> None:
    assert not set("ilou") & set("".join(new_id(wall) for wall in range(0, 2_000_000, 777)))


def test_the_first_end_counts() -> None:
    with record() as life:
        life.finish(Outcome(Reason.OK, EndedBy.CLIENT))
        life.end(Reason.INTERNAL, EndedBy.PROXY, "what followed from it")
    assert (life.reason, life.ended_by, life.detail) == (Reason.OK, EndedBy.CLIENT, "")


@pytest.mark.parametrize(
    ("reason", "phase", "state"),
    [
        (Reason.NO_ENDPOINT, Phase.QUEUE, State.REFUSED),
        (Reason.LOOP, Phase.ACCEPT, State.REFUSED),
        (Reason.CONNECT_REFUSED, Phase.CONNECT, State.FAILED),
        (Reason.AUTHZ_DENIED, Phase.AUTHZ, State.DENIED),
        (Reason.AUTHZ_REVOKED, Phase.DATA, State.DENIED),
        (Reason.AUTHN_PLAINTEXT, Phase.AUTHZ, State.DENIED),
        (Reason.AUTHN_DISABLED, Phase.AUTHZ, State.DENIED),
    ],
)
def test_a_failure_ends_the_record_and_goes_no_further(reason: Reason, phase: Phase, state: State) -> None:
    with record() as life:
        life.phase = phase
        raise ConnectionFailed(reason, "why", ended_by=EndedBy.POLICY, policy="nobody")
    assert (life.reason, life.detail, life.ended_by, life.policy) == (reason, "why", EndedBy.POLICY, "nobody")
    assert life.state is state


@pytest.mark.produces("internal")
def test_a_bug_ends_one_record_as_internal_and_goes_no_further(caplog: pytest.LogCaptureFixture) -> None:
    with record() as life:
        raise ZeroDivisionError("a bug")
    assert (life.reason, life.detail) == (Reason.INTERNAL, "ZeroDivisionError: a bug")
    note([life.view()])
    assert life.id in caplog.text


def test_an_abort_from_outside_ends_the_connection_before_its_next_phase() -> None:
    with record() as life:
        life.abort(Reason.AUTHZ_REVOKED, EndedBy.POLICY, "no more", policy="nobody")
        life.abort(Reason.DRAIN, EndedBy.DRAIN)
        life.go_on()
        raise AssertionError("it went on")
    assert (life.reason, life.ended_by, life.policy) == (Reason.AUTHZ_REVOKED, EndedBy.POLICY, "nobody")


async def test_a_cancellation_from_above_ends_the_record_and_goes_on() -> None:
    life = record()
    with trio.CancelScope() as above, life:
        above.cancel()
        await trio.lowlevel.checkpoint()
    assert above.cancelled_caught
    assert life.reason is Reason.DRAIN


def test_a_client_is_reset_and_not_closed_when_its_connection_fails() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    with client:
        with registry().life(Direction.OUTBOUND, SOURCE, accepted):
            raise ConnectionFailed(Reason.NO_ENDPOINT)
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_a_record_in_the_middle_of_its_life_says_where_it_is() -> None:
    life = record()
    states = []
    for phase in (Phase.ACCEPT, Phase.QUEUE, Phase.CONNECT, Phase.DATA):
        life.phase = phase
        states.append(life.state)
    life.tally.client_done = True
    states.append(life.state)
    life.tally.client_done, life.tally.endpoint_done = False, True
    states.append(life.state)
    assert states == [
        State.CONNECTING,
        State.QUEUED,
        State.CONNECTING,
        State.OPEN,
        State.HALF_IN,
        State.HALF_OUT,
    ]
