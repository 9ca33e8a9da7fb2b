"""How a connection ends, by whatever an application does, and what that costs its tunnel."""

import socket

import pytest

from meshnet.model.connection import State
from tests.proxy.programs import Records, accept, listen, read, read_all, reason
from tests.traffic.conftest import Hosts, Name
from tests.world import wait_for

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("who", ["client", "server"])
def test_who_says_fin_and_leaves_with_words_unread_is_a_reset_on_both_sides_and_costs_no_tunnel(
    hosts: Hosts, name: Name, who: str
) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(name, [api]))
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(api))
    with listen(api, name.port) as server:
        for _ in range(3):
            client = hosts.web.connect(name.address, name.port)
            app = accept(server)
            leaves, stays = (client, app) if who == "client" else (app, client)
            leaves.sendall(b"that is all")
            leaves.shutdown(socket.SHUT_WR)
            assert read_all(stays) == b"that is all"
            stays.sendall(b"one moment")
            assert read(leaves, 1) == b"o"
            leaves.close()  # what it has not read makes this an RST
            with stays, pytest.raises((ConnectionResetError, BrokenPipeError)):  # EPIPE for an RST behind a FIN
                while True:
                    stays.sendall(b"are you there?")
            wait_for(lambda: not any(each.leased for each in hosts.sidecar(hosts.web).status().tunnels))
    there, here = out.ended(3), into.ended(3)
    for record in (*there, *here):
        assert record.state is State.FAILED
        assert reason(record) == f"peer.rst by {who} in half-closed"
    assert [record.tls.handshake_ms for record in there][1:] == [None, None]
