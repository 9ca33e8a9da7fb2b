"""TLS by the core: handshakes on a thread of their own, channels that the native relay can take over."""

import errno
import hashlib
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from meshnet.errors import ConnectionFailed, Reason
from meshnet.net.deadline import Deadlines
from meshnet.net.sockets import OUR_SHORTAGE, shortage
from meshnet.net.strand import Wait, on_strand
from meshnet.net.tls import ALPN, Channel, Returned, Ticket, handshake_timeout, not_verified, peer_identity
from meshnet.relay.native.reasons import END_NAMES

if TYPE_CHECKING:
    from meshnet.relay.native._core import Core, Session, Tunnel

# What the peer's alert may say about our certificate (RFC 8446, 6.2): SSL_R_*, which is 1000 and the alert's number.
_OUR_CERTIFICATE = frozenset({1042, 1043, 1044, 1045, 1046, 1048, 1116})
_MOST_NUMBERS = 65536
_TICKET_KEYS = 80  # bytes, as OpenSSL wants them
_HUNG_UP = frozenset({0, errno.ECONNRESET, errno.EPIPE})


class NativeChannel:
    """See meshnet.net.tls.Channel. Its `wake` is called in trio's thread when the core has news of it."""

    __slots__ = (
        "__weakref__",
        "_number_of",
        "_tunnel",
        "_waiting",
        "cipher",
        "context",
        "good_until",
        "identity",
        "resumed",
        "version",
    )

    def __init__(self, context: object, number_of: Callable[[str], int]) -> None:
        """`number_of` an identity is what the core's orders call it by; 0: by nothing."""
        self.context = context
        self._number_of = number_of
        self.identity = self.version = self.cipher = ""
        self.good_until = 0.0
        self.resumed = False
        self._waiting: trio.lowlevel.Task | Wait | None = None
        self._tunnel: Tunnel | None = None

    @property
    def tunnel(self) -> "Tunnel":
        assert self._tunnel is not None
        return self._tunnel

    @property
    def ticket(self) -> Ticket | None:
        return self.tunnel.session()

    def wake(self) -> None:
        waiting, self._waiting = self._waiting, None
        if isinstance(waiting, Wait):
            waiting.done()
        elif waiting is not None:
            trio.lowlevel.reschedule(waiting)

    async def shake(
        self,
        sock: socket.socket,
        core: "Core",
        relay: "Core",
        deadlines: Deadlines,
        timeout: float,
        *,
        is_client: bool,
        ticket: "Session | None",
    ) -> None:
        """On `core`, for use on `relay`. Owns `sock`. Raises ConnectionFailed(tls.*)."""
        try:
            self._tunnel = core.shake(self.context, sock.fileno(), is_client, ticket, self)
        except BaseException:
            sock.close()
            raise
        sock.detach()
        deadline = deadlines.set(self.tunnel.shut, timeout)
        try:
            while not (state := self.tunnel.state())[0]:
                if state[1]:
                    raise handshake_timeout(timeout, is_client) if deadline.passed else _failure(state)
                await self._news()
            certificate, version, cipher, self.resumed = self.tunnel.peer()
            self.version, self.cipher = sys.intern(version), sys.intern(cipher)
            self.identity, self.good_until = peer_identity(certificate)
            self.tunnel.adopt(relay)
        except BaseException:
            self.tunnel.close()
            raise
        finally:
            deadline.done()

    async def send_all(self, data: bytes) -> None:
        self.send_now(data)

    def send_now(self, data: bytes) -> None:
        try:
            self.tunnel.say(data)
        except RuntimeError as error:
            raise OSError(str(error)) from error

    async def receive(self) -> bytes:
        while (data := self.receive_now()) is None:
            await self._news()
        return data

    def serve(self, host: str) -> None:
        number = self._number_of(self.identity)
        if number:
            self.tunnel.serve(number, host, self.good_until)

    def stop_serving(self, host: str) -> None:
        self.good_until = 0.0
        self.serve(host)

    def last_ends(self) -> tuple[str, str]:
        sent, received = self.tunnel.last_ends()
        return END_NAMES.get(sent, ""), END_NAMES.get(received, "")

    def receive_now(self) -> bytes | None:
        if data := self.tunnel.take():
            return data
        state = self.tunnel.state()
        if not state[1]:
            return None
        if state[5]:
            raise _failure(state)
        if state[2]:
            raise OSError(state[2], os.strerror(state[2]))
        return b""

    def shut(self) -> None:
        self.tunnel.shut()

    def close(self) -> None:
        self.tunnel.close()

    async def _news(self) -> None:
        assert self._waiting is None
        if on_strand():
            self._waiting = wait = Wait()
            await wait
            return
        self._waiting = trio.lowlevel.current_task()

        def cancel(raise_cancel: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
            self._waiting = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(cancel)


class NativeDepot:
    """See meshnet.net.tls.Depot. Its `hear` is called in trio's thread when a channel comes back by itself."""

    __slots__ = ("_come_back", "handle")

    def __init__(self, core: "Core", come_back: Callable[[Returned], None]) -> None:
        self._come_back = come_back
        self.handle = core.depot(self)

    def park(self, channel: Channel) -> None:
        assert isinstance(channel, NativeChannel)
        self.handle.park(channel.tunnel)

    def take(self) -> Returned | None:
        back = self.handle.take()
        return None if back is None else Returned._make(back)

    def recall(self) -> list[Returned]:
        return [Returned._make(back) for back in self.handle.recall()]

    def counts(self) -> tuple[int, int, int]:
        return self.handle.counts()

    def hear(self, what: int, about: tuple[Channel, int, float]) -> None:
        self._come_back(Returned._make(about))


class NativeTls:
    """See meshnet.net.tls.Tls. Handshakes take milliseconds, so they are not made on the thread that relays.

    Nor those that others begin on the thread of our own: anybody can begin one, and how many is up to them.
    """

    def __init__(self, dialled: "Core", accepted: "Core", relay: "Core", ticket_secret: bytes = b"") -> None:
        """`ticket_secret`: of all processes that serve the same ports, if there are others."""
        self._ticket_secret = ticket_secret
        self._dialled = dialled
        self._accepted = accepted
        self._relay = relay
        self._deadlines = Deadlines()
        self._numbers: dict[str, int] = {}

    def number_of(self, identity: str) -> int:
        """Of an identity that orders may be for; 0 when there are too many."""
        number = self._numbers.get(identity)
        if number is None:
            if len(self._numbers) >= _MOST_NUMBERS:
                return 0
            number = self._numbers[identity] = len(self._numbers) + 1
        return number

    def depot(self, come_back: Callable[[Returned], None]) -> NativeDepot:
        return NativeDepot(self._relay, come_back)

    def context(self, certificate: str, key: str, bundle: str, *, is_server: bool) -> object:
        from meshnet.relay.native._core import Context

        # Read also for an OSError that names the file: OpenSSL would say only that it cannot.
        read = [Path(file).read_bytes() for file in (certificate, key, bundle)]
        if not is_server or not self._ticket_secret:
            return Context(certificate, key, bundle, is_server)
        # Who has the same certificate and believes the same authorities has the same keys, and nobody else: with
        # either, sessions end.
        keys = hashlib.shake_256(b"".join([self._ticket_secret, *map(_digest, read)])).digest(_TICKET_KEYS)
        return Context(certificate, key, bundle, is_server, keys)

    async def connect(
        self, sock: socket.socket, context: object, ticket: Ticket | None, timeout: float
    ) -> NativeChannel:
        channel = NativeChannel(context, self.number_of)
        await channel.shake(
            sock,
            self._dialled,
            self._relay,
            self._deadlines,
            timeout,
            is_client=True,
            ticket=ticket,  # type: ignore[arg-type] # only our own come back
        )
        return channel

    async def accept(self, sock: socket.socket, context: object, timeout: float) -> NativeChannel:
        channel = NativeChannel(context, self.number_of)
        await channel.shake(sock, self._accepted, self._relay, self._deadlines, timeout, is_client=False, ticket=None)
        return channel


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _failure(state: tuple[bool, bool, int, int, str, int, str]) -> ConnectionFailed:
    """What the core's `Tunnel.state` means to an operator."""
    _, _, number, verify, verify_text, ssl_reason, ssl_text = state
    if verify:
        return not_verified(verify, verify_text)
    if ssl_reason in _OUR_CERTIFICATE:
        return ConnectionFailed(Reason.TLS_NO_IDENTITY, f"the peer does not take our certificate: {ssl_text}")
    if ssl_reason:
        return ConnectionFailed(Reason.TLS_HANDSHAKE, f"TLS: {ssl_text}")
    if number == errno.EPROTO:
        return ConnectionFailed(Reason.TLS_HANDSHAKE, f"the peer does not speak {ALPN}")
    if number in OUR_SHORTAGE:
        return shortage(f"cannot make a tunnel: {os.strerror(number)}")
    if number in _HUNG_UP:
        return ConnectionFailed(Reason.TLS_HANDSHAKE, "the peer hung up during the handshake")
    return ConnectionFailed(Reason.TLS_HANDSHAKE, f"TLS: {os.strerror(number)}")
