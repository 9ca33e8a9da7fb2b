"""Listeners that outlive their process: what an init system keeps for the next one, and gives to it.

systemd's descriptor store: sd_notify(3) FDSTORE=1, systemd.service(5) FileDescriptorStoreMax=, sd_listen_fds(3).
"""

import os
import socket
from collections.abc import Iterator, Sequence

from meshnet.net.sockets import inherited

_FIRST = 3  # SD_LISTEN_FDS_START


def handed_over() -> dict[str, list[socket.socket]]:
    """The TCP listeners that this process was given, by name. What it starts itself does not hear of them."""
    process, count, names = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if process != str(os.getpid()) or not count.isdecimal():
        return {}
    found: dict[str, list[socket.socket]] = {}
    for descriptor, name in zip(range(_FIRST, _FIRST + int(count)), names.split(":"), strict=False):
        try:
            found.setdefault(name, []).append(inherited(descriptor))
        except OSError:
            continue  # it is no socket
    return found


def messages(listeners: Sequence[tuple[str, Sequence[socket.socket]]]) -> Iterator[tuple[bytes, list[int]]]:
    """What is to be said to have them kept, each with the descriptors that go with it.

    What was kept under their names before goes: of two that listen at one address one would never be asked.
    """
    for name, found in listeners:
        yield f"FDSTOREREMOVE=1\nFDNAME={name}\n".encode(), []
        yield f"FDSTORE=1\nFDNAME={name}\n".encode(), [sock.fileno() for sock in found]
