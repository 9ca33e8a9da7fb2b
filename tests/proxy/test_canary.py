"""A canary that is answered, whether or not its sender still waits."""

import select
import socket

import pytest

from meshnet.errors import Reason
from meshnet.model.address import Address
from meshnet.model.canary import CANARY_PORT, CANARY_V4, greeting
from meshnet.net.sockets import reset
from meshnet.proxy.canary import answer_canary
from tests.proxy.test_record import record

GOAL = Address(CANARY_V4, CANARY_PORT)


@pytest.mark.parametrize("waits", [True, False])
def test_a_sender_that_has_given_up_is_no_failure_of_the_proxys(waits: bool) -> None:
    """It waited in the queue of the listeners while the sidecar was started again."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        client, _ = server.accept()
    with sender, client:
        if not waits:
            reset(sender)
            select.select([client], [], [])
        answered = record()
        answer_canary(client, GOAL, answered)
        assert answered.reason is Reason.OK
        if waits:
            assert sender.recv(100) == greeting(GOAL)
