"""What systemd hears of a sidecar that it started with Type=notify: sd_notify(3), spoken without its library.

READY when questions are answered, and connections wait at worst for the mesh to be read; whether it can do its work is
in STATUS. WATCHDOG is said from trio's own loop, so that a loop that stands still is restarted.
"""

import logging
import os
import socket
from typing import Self

import trio

from meshnet.model.admin import GetStatus, Status
from meshnet.net.handover import messages
from meshnet.proxy.admin import Answers
from meshnet.proxy.listen import OWN, Listeners

_log = logging.getLogger("meshnet.proxy")

_EVERY = 5.0  # seconds, where no watchdog asks for more


class Notifier:
    """A context manager. `every`: how often it wants to hear that we are alive, in seconds."""

    def __init__(self, address: str, every: float) -> None:
        self._address = address
        self.every = every
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    @classmethod
    def from_environment(cls) -> "Notifier | None":
        """None where nobody wants to hear. What we start does not see the variables."""
        address = os.environ.pop("NOTIFY_SOCKET", "")
        microseconds = os.environ.pop("WATCHDOG_USEC", "")
        if not address:
            return None
        every = int(microseconds) / 2e6 if microseconds.isdecimal() and int(microseconds) else _EVERY
        return cls("\0" + address[1:] if address.startswith("@") else address, min(_EVERY, every))

    def connect(self) -> bool:
        """Whether somebody hears."""
        self._sock.setblocking(False)
        try:
            self._sock.connect(self._address)
        except OSError as error:
            _log.warning("cannot tell %s how we are: %s", self._address.replace("\0", "@"), error.strerror)
            return False
        return True

    def tell(self, *lines: str) -> None:
        """Assignments as sd_notify(3) has them, and that we are alive."""
        text = "".join(line.replace("\n", " ") + "\n" for line in ("WATCHDOG=1", *lines))
        try:
            self._sock.send(text.encode())
        except OSError as error:  # it is restarted, or has more to read than it can
            _log.debug("systemd did not hear us: %s", error.strerror)

    def keep(self, listeners: Listeners) -> None:
        """Has whoever started us keep copies of them for the process after us: who connects meanwhile waits there."""
        for text, descriptors in messages([(name, found) for name, found in listeners.items() if name not in OWN]):
            try:
                socket.send_fds(self._sock, [text], descriptors)
            except OSError as error:
                _log.warning("systemd does not keep the listeners over a restart: %s", error.strerror)
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._sock.close()


async def keep_told(answers: Answers, listeners: Listeners) -> None:
    """Until it is cancelled; returns at once where nobody wants to hear."""
    notifier = Notifier.from_environment()
    if notifier is None:
        return
    with notifier:
        if not notifier.connect():
            return
        notifier.keep(listeners)
        said = ["READY=1"]
        while True:
            notifier.tell(*said, *await _status(answers))
            said = []
            await trio.sleep(notifier.every)


async def _status(answers: Answers) -> list[str]:
    """One line, as `systemctl status` shows it."""
    status = await answers.answer(GetStatus())
    assert isinstance(status, Status)  # nothing else answers that
    if status.draining:
        return [f"STATUS=draining, {status.open_connections} connections", "STOPPING=1"]
    if status.ready:
        return [f"STATUS={status.config.services} services, {status.open_connections} connections"]
    return ["STATUS=not ready: " + "; ".join(status.not_ready_because)]
