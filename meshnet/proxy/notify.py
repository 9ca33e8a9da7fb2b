"""What systemd hears of a sidecar that it started with Type=notify: sd_notify(3), spoken without its library.

READY when questions are answered, and connections wait at worst for the mesh to be read; whether it can do its work is
in STATUS. WATCHDOG is said from trio's own loop, so that a loop that stands still is restarted.
"""

import logging
import os
import socket

import trio

from meshnet.model.admin import GetStatus, Status
from meshnet.proxy.admin import Answers

_log = logging.getLogger("meshnet.proxy")

_EVERY = 5.0  # seconds, where no watchdog asks for more


async def keep_told(answers: Answers) -> None:
    """Until it is cancelled; returns at once where nobody wants to hear."""
    address = os.environ.pop("NOTIFY_SOCKET", "")  # not for what we start
    microseconds = os.environ.pop("WATCHDOG_USEC", "")
    if not address:
        return
    every = min(_EVERY, int(microseconds) / 2e6) if microseconds.isdecimal() and int(microseconds) else _EVERY
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)
        try:
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
        except OSError as error:
            _log.warning("cannot tell %s how we are: %s", address, error.strerror)
            return
        said = b"READY=1\n"
        while True:
            _tell(sock, said + b"WATCHDOG=1\nSTATUS=" + await _status(answers))
            said = b""
            await trio.sleep(every)


async def _status(answers: Answers) -> bytes:
    """One line, as `systemctl status` shows it."""
    status = await answers.answer(GetStatus())
    assert isinstance(status, Status)  # nothing else answers that
    if status.draining:
        text = f"draining, {status.open_connections} connections"
    elif status.ready:
        text = f"{status.config.services} services, {status.open_connections} connections"
    else:
        text = "not ready: " + "; ".join(status.not_ready_because)
    stopping = "STOPPING=1\n" if status.draining else ""
    return (text.replace("\n", " ") + "\n" + stopping).encode()


def _tell(sock: socket.socket, message: bytes) -> None:
    try:
        sock.send(message)
    except OSError as error:  # it is restarted, or has more to read than it can
        _log.debug("systemd did not hear us: %s", error.strerror)
