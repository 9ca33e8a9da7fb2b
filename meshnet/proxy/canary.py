"""A captured canary: its sender learns that it was captured, and it goes no further."""

import socket
from contextlib import suppress

from meshnet.errors import EndedBy, Reason
from meshnet.model.address import Address
from meshnet.model.canary import greeting, is_canary
from meshnet.proxy.record import Record


def answer_canary(client: socket.socket, destination: Address, record: Record) -> None:
    """Ends the record well. Only a person's canary is to be seen afterwards."""
    with suppress(OSError):  # who has sent it may have given up: it waited in our queue for a sidecar to start
        client.send(greeting(destination))
    client.close()
    record.end(Reason.OK, EndedBy.PROXY, "capture canary")
    record.hidden = not is_canary(destination)
