"""The client of an outbound connection: accepted already, or (meshnet.proxy.held) not before an endpoint is reached."""

import socket
from typing import Protocol

from meshnet.codec.frames import MAX_DATA
from meshnet.errors import ConnectionFailed, EndedBy, Reason
from meshnet.net import sockets
from meshnet.relay import PlainLeg


class Client(Protocol):
    def gave_up(self) -> bool:
        """Whether it is known to have, looked at without taking a byte."""

    def early_data(self) -> bytes:
        """What it has sent already: it goes up with OPEN, and is kept until OPENED to be sent elsewhere.

        Raises ConnectionFailed(peer.rst).
        """

    async def leg(self) -> PlainLeg:
        """Its leg, once an endpoint is reached. Raises ConnectionFailed(peer.rst) if it does not come."""


class AcceptedClient:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def gave_up(self) -> bool:
        return sockets.was_reset(self._sock)

    def early_data(self) -> bytes:
        try:
            return self._sock.recv(MAX_DATA)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise ConnectionFailed(Reason.PEER_RST, "the client gave up", ended_by=EndedBy.CLIENT) from error

    async def leg(self) -> PlainLeg:
        return PlainLeg(self._sock)
