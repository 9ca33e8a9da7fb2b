"""Who is told of a connection may ask what else there is to tell: each is told once all the same, and in order."""

import contextlib
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from meshnet.model.address import Address
from meshnet.relay import Facts, Outcome, Target
from tests.relay.leaks import nothing_left
from tests.relay.native.test_depots import FLOW, Stand, Told, standing
from tests.relay.native.test_orders import DIALLED, ELSEWHERE, NOBODY_LISTENS, converse
from tests.world import Host, wait_for

pytestmark = pytest.mark.netns


@dataclass
class Curious(Told):
    """Does something before it has looked at what it is told."""

    first: Callable[[], None] = lambda: None

    def came_and_went(self, facts: Facts, outcome: Outcome) -> None:
        self.first()
        super().came_and_went(facts, outcome)


async def test_the_end_of_one_is_not_known_before_its_beginning(host: Host) -> None:
    """As where an endpoint fails, and policy ends what is open to it, while news of that are still to be told."""
    with host.entered():
        async with nothing_left():
            async with standing(host) as stand:
                _end_one_while_it_is_told_of_another(stand)
            vars(stand).clear()


def _end_one_while_it_is_told_of_another(stand: Stand) -> None:
    """Trio, and with it who listens to the core, waits until it returns."""
    relay, told, refused = stand.relay, Told(), Curious()
    bell = relay._cores[0].fileno()
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as stack:
        server.settimeout(5)
        relay.order(FLOW, Target(Address(*NOBODY_LISTENS), 0, False, 5.0), 1000, refused)
        elsewhere = FLOW._replace(original=Address(*ELSEWHERE))
        order = relay.order(elsewhere, Target(Address(*server.getsockname()), 0, False, 5.0), 1000, told)
        stack.enter_context(stand.host.connect(*DIALLED))
        wait_for(lambda: select.select([bell], [], [], 0)[0], what="the news that nobody listens there")
        client = stand.host.connect(*ELSEWHERE)
        app, _ = server.accept()

        def end() -> None:
            assert not told.begun
            converse(client, app)
            wait_for(lambda: order.state()[1] == 0, what="it is over")
            wait_for(lambda: select.select([bell], [], [], 0)[0], what="the news of it")
            relay.catch_up()

        refused.first = end
        relay.catch_up()
        assert (len(told.begun), len(told.ended)) == (1, 1)
        ((facts, _),) = refused.ended
        socket.socket(fileno=facts.client).close()
