"""What Python hears of connections that came and went under an order: of many at once, and of none of them twice."""

import select
import time
from typing import Any

import pytest

from meshnet.errors import EndedBy
from meshnet.relay.native.reasons import ENDED_BY
from meshnet.relay.rows import Rows
from tests.relay.native.heard import PASSED
from tests.relay.native.test_orders import ENDED, Gate, converse
from tests.relay.native.test_orders import gate as gate  # the fixture
from tests.world import wait_for

pytestmark = pytest.mark.netns


def over(gate: Gate, count: int) -> list[tuple[Any, int, Any]]:
    """The news, once so many connections have ended since they were fetched last."""
    (order,) = gate.orders
    wait_for(lambda: order.state()[1] == 0, what="their places are free again")
    wait_for(lambda: select.select([gate.core.fileno()], [], [], 0)[0], what="the bell")
    return gate.core.news()


def rows_of(said: tuple[Any, int, Any]) -> Rows:
    _, kind, (data, cipher, ended_by) = said
    assert kind == PASSED
    return Rows(data, cipher, ENDED_BY[ended_by])


def hang_up_first(gate: Gate) -> None:
    """The application's last word comes before its client's."""
    with gate.client() as client:
        gate.app().close()
        assert client.recv(1) == b""


def test_those_that_end_alike_are_told_at_once(gate: Gate) -> None:
    gate.order()
    before = time.time()
    ports = []
    for _ in range(5):
        client = gate.client()
        ports.append(client.getsockname()[1])
        converse(client, gate.app())
    seen: list[Rows] = []
    while sum(map(len, seen)) < 5:
        seen += map(rows_of, over(gate, 5))
    rows = [row for each in seen for row in each]
    assert [row.port for row in rows] == ports
    assert {(each.cipher, each.ended_by) for each in seen} == {("", EndedBy.CLIENT)}
    for row in rows:
        assert (row.sent, row.received) == (8, 10)
        assert before - 1 < row.opened / 1e6 < time.time() + 1
        assert row.idle <= row.ended
        assert row.connected <= row.ended < 10_000_000
    assert len({row.id for row in rows}) == 5
    assert sorted(row.id for row in rows) == [row.id for row in rows]  # by time


def test_those_that_end_otherwise_are_told_apart(gate: Gate) -> None:
    gate.order()
    converse(gate.client(), gate.app())
    hang_up_first(gate)
    converse(gate.client(), gate.app())
    seen: list[Rows] = []
    while sum(map(len, seen)) < 3:
        seen += map(rows_of, over(gate, 3))
    assert [(each.ended_by, len(each)) for each in seen] == [
        (EndedBy.CLIENT, 1),
        (EndedBy.SERVER, 1),
        (EndedBy.CLIENT, 1),
    ]


def test_one_whose_order_was_revoked_is_told_by_itself(gate: Gate) -> None:
    order = gate.order()
    with gate.client() as client:
        app = gate.app()
        order.revoke()
        converse(client, app)
    (facts,) = gate.facts()
    assert facts.owes
    assert [kind for _, kind, _ in gate.heard if kind == ENDED]


def test_an_order_that_is_revoked_before_they_are_told_stays_for_that(gate: Gate) -> None:
    gate.order()
    converse(gate.client(), gate.app())
    wait_for(lambda: gate.orders[0].state()[1] == 0)
    gate.orders.pop().revoke()
    (facts,) = gate.facts()
    assert facts.sent == 8
