"""Packets that conntrack cannot place: nobody translates them back, and the host answers them with a reset."""

import socket
import struct
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.init.kernel import APP_PORT, INBOUND, Lab, Open, connect, listening
from tests.world import wait_for

pytestmark = pytest.mark.netns

_REPAIR, _REPAIR_QUEUE, _QUEUE_SEQ, _REPAIR_OFF_QUIETLY = 19, 20, 21, -1  # linux/tcp.h
_RECEIVED, _SENT = 1, 2
_FAR_AWAY = 0x40000000


@pytest.fixture
def captured(lab: Lab) -> Iterator[Open]:
    with listening(lab.app, "ipv4", INBOUND) as inbound:
        lab.install()
        opened = connect(lab.peer, lab.app.address, APP_PORT, inbound)
        assert opened.works()
        yield opened
        opened.close()


def send_what_fits_nowhere(lab: Lab, client: socket.socket) -> None:
    """A segment of this connection, far outside its window, that acknowledges what the client has received."""
    client.setsockopt(socket.IPPROTO_TCP, _REPAIR, 1)
    numbers = []
    for queue in (_SENT, _RECEIVED):
        client.setsockopt(socket.IPPROTO_TCP, _REPAIR_QUEUE, queue)
        numbers.append(client.getsockopt(socket.IPPROTO_TCP, _QUEUE_SEQ) & 0xFFFFFFFF)
    client.setsockopt(socket.IPPROTO_TCP, _REPAIR, _REPAIR_OFF_QUIETLY)
    sequence, acknowledged = (numbers[0] + _FAR_AWAY) & 0xFFFFFFFF, numbers[1]
    ports = client.getsockname()[1], APP_PORT
    segment = struct.pack("!HHIIBBHHH", *ports, sequence, acknowledged, 5 << 4, 0x18, 512, 0, 0) + b"late"
    ends = socket.inet_aton(lab.peer.address) + socket.inet_aton(lab.app.address)
    pseudo = ends + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(segment)) + segment
    checksum = sum(struct.unpack(f"!{len(pseudo) // 2}H", pseudo))
    while checksum >> 16:
        checksum = (checksum & 0xFFFF) + (checksum >> 16)
    segment = segment[:16] + struct.pack("!H", ~checksum & 0xFFFF) + segment[18:]
    with closing(lab.peer.open_socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)) as raw:
        raw.sendto(segment, (lab.app.address, 0))


def test_one_of_them_resets_a_captured_connection(lab: Lab, captured: Open) -> None:
    send_what_fits_nowhere(lab, captured.client)

    with pytest.raises(ConnectionResetError):
        captured.client.recv(1)


def test_they_can_be_dropped_istio36489(lab: Lab, captured: Open) -> None:
    lab.install(drop_invalid=True)
    send_what_fits_nowhere(lab, captured.client)

    def dropped() -> int:
        with lab.app.entered():
            installed = lab.backend.installed()
        assert installed is not None
        return sum(it.packets for it in installed.rules if it.rule.invalid)

    wait_for(dropped, what="it is dropped")
    assert captured.works()
