"""TCP sockets as the proxy wants them: listening, accepting, connecting, resetting."""

import errno
import logging
import os
import random
import socket
import struct
from collections.abc import Awaitable, Callable

import trio

from meshnet.errors import ConnectionFailed, EndedBy, Reason
from meshnet.model.address import Address, canonical_host
from meshnet.net.strand import in_task

_log = logging.getLogger("meshnet.net")

_BACKLOG = 4096
_ACCEPT_BATCH = 64  # then trio's other tasks get their turn
ACCEPT_PAUSE = 0.1  # seconds before the next try, when nothing can be accepted
_QUIET = 60.0  # seconds without it before the same trouble is worth another line in the log
# Below what Linux (32768), other systems (49152) and RFC 6056 take for connections of their own.
_SOURCE_PORTS = range(1024, 32768)
_SOURCE_PORT_TRIES = 20
_TRANSPARENT = {socket.AF_INET: (socket.IPPROTO_IP, 19), socket.AF_INET6: (socket.IPPROTO_IPV6, 75)}
_LINGER_RESET = struct.pack("ii", 1, 0)

# Below the 60 s after which conntrack forgets a half-closed connection (CLOSE_WAIT): the probes refresh the entry, so
# the NAT lives as long as the sockets do. Each leg has its own times, for thousands that were opened together would
# probe together, and the queues on their way have no room for all. No TCP_USER_TIMEOUT: that would end one that only
# does not read; relays look for those that are gone (relay/native/gone.c, net/tcp_state.py).
_KEEPALIVE_IDLE, _KEEPALIVE_INTERVAL, _KEEPALIVE_COUNT = range(25, 36), range(7, 11), 6

_BROKEN_LISTENER = frozenset({errno.EBADF, errno.EFAULT, errno.EINVAL, errno.ENOTSOCK})
# What befell that one connection before we took it (accept(2), "Error handling"); listen.c has the same.
_OF_ONE_CONNECTION = frozenset(
    {
        errno.EINTR,
        errno.ECONNABORTED,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENONET,
        errno.ETIMEDOUT,
    }
)
OUR_SHORTAGE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC})
"""Errnos by which this host says that it lacks something, which is nobody's doing at the other end."""

GONE = frozenset(
    {
        errno.ETIMEDOUT,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.ECONNREFUSED,
        errno.ENOPROTOOPT,
        errno.EACCES,
    }
)
"""Errnos of a connection whose peer has answered nothing to the last retry: why, as the way there last told, by ICMP
(net/ipv4/icmp.c, icmp_err_convert). A peer that resets it is none of these."""

_CONNECT_REASONS = {
    errno.ECONNREFUSED: Reason.CONNECT_REFUSED,
    errno.ECONNRESET: Reason.CONNECT_REFUSED,
    errno.ETIMEDOUT: Reason.CONNECT_TIMEOUT,
}


def listen(host: str, port: int, *, transparent: bool = False) -> socket.socket | None:
    """A non-blocking listener on one family, or None where this host has no such family or address.

    `transparent`: TPROXY may give it connections for other addresses and ports (ip(7), IP_TRANSPARENT), which takes
    CAP_NET_ADMIN or CAP_NET_RAW. What is set here is inherited by every accepted socket (Linux), so accepting costs no
    further calls.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:
            return None
        raise
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if transparent:
            make_transparent(sock)
        _tune(sock)
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRNOTAVAIL:
            return None
        raise
    return sock


def inherited(descriptor: int) -> socket.socket:
    """A listener that another process has made with `listen`; nothing that this process starts gets it."""
    sock = socket.socket(fileno=descriptor)
    sock.setblocking(False)
    sock.set_inheritable(False)
    return sock


async def accept_forever(
    listener: socket.socket,
    carry: Callable[[socket.socket, Address], object],
    room: Callable[[], Awaitable[int]] | None = None,
) -> None:
    """Calls `carry` with each accepted, non-blocking socket and its peer. Survives running out of descriptors, and
    whatever else may pass. Raises OSError when `listener` is none.

    `room` says how many more there may be, and waits until there may: the others wait in the kernel.

    Cancelled, it takes those that still wait, for the kernel has told their clients that they are connected, and
    closes the listener.
    """
    trouble = AcceptTrouble(listener)
    try:
        while True:
            await trio.lowlevel.wait_readable(listener)
            most = _ACCEPT_BATCH if room is None else min(_ACCEPT_BATCH, await room())
            if code := _accept_some(listener, carry, most):
                trouble.tell(code)
                await trio.sleep(ACCEPT_PAUSE)
    finally:
        accept_the_rest(listener, carry)


def accept_the_rest(listener: socket.socket, carry: Callable[[socket.socket, Address], object]) -> None:
    """Takes those that still wait at `listener`, if they can be taken, and closes it."""
    _accept_some(listener, carry, _BACKLOG)
    listener.close()


class AcceptTrouble:
    """Why nothing can be accepted at a listener, for the log: once, and not for every try."""

    def __init__(self, listener: socket.socket) -> None:
        self._port = listener.getsockname()[1]
        self._code = 0
        self._heard_at = -_QUIET

    def tell(self, code: int) -> None:
        """`code`: an errno of accept(2). Raises OSError when trying again is of no use."""
        if code in _BROKEN_LISTENER:
            raise OSError(code, f"cannot accept on port {self._port}: {os.strerror(code)}")
        now = trio.current_time()
        if code != self._code or now - self._heard_at > _QUIET:
            _log.error("cannot accept on port %d: %s", self._port, os.strerror(code))
        self._code, self._heard_at = code, now


def adopt(fd: int, host: str) -> socket.socket:
    """A socket object for the descriptor of a connected, non-blocking TCP socket with a peer at `host`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0, fd)
    _spread(sock)
    return sock


def peer_address(pair: tuple[str, int] | tuple[str, int, int, int]) -> Address:
    """An Address from what the socket module gives, v4-mapped folded into IPv4, without a zone."""
    host = pair[0]
    if ":" in host:
        host = canonical_host(host.partition("%")[0])
    return Address(host, pair[1])


def port_of(sock: socket.socket) -> int:
    """Ours; 0 of one that was reset."""
    port: int = sock.getsockname()[1]
    return port


async def connect(
    address: Address, *, mark: int, timeout: float, local: bool = False, source: str = ""
) -> socket.socket:
    """A connected, non-blocking socket, marked as the proxy's own. Raises ConnectionFailed(connect.*).

    `local`: the address is this host's, where a peer cannot vanish without a word and needs no keepalive. `source`:
    the address it comes from, which need not be this host's, as long as the answers find their way back.
    """
    family = socket.AF_INET6 if address.is_v6 else socket.AF_INET
    if source:
        sock, code = _dial_as(source, address, family, mark)
    else:
        sock = _socket(family, mark)
        code = _begin(sock, address)
    try:
        if local:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            _tune(sock)
        if code == errno.EALREADY:
            await in_task()
            with trio.move_on_after(timeout):
                await trio.lowlevel.wait_writable(sock)
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code == errno.EALREADY:
            raise connect_failure(address, errno.ETIMEDOUT, timeout)
        if code:
            raise connect_failure(address, code, timeout)
    except BaseException:
        sock.close()
        raise
    return sock


def connect_failure(address: Address, code: int, timeout: float) -> ConnectionFailed:
    """What the errno `code` of a connect to `address` means, or of one that took `timeout` seconds."""
    if code == errno.ETIMEDOUT:
        return ConnectionFailed(Reason.CONNECT_TIMEOUT, f"{address} did not answer within {timeout:.3g} s")
    if code == errno.EADDRNOTAVAIL and _has_source(address):
        return shortage(f"no port is left for one more connection to {address}")
    if code in OUR_SHORTAGE:
        return shortage(f"cannot dial {address}: {os.strerror(code)}")
    reason = _CONNECT_REASONS.get(code, Reason.CONNECT_UNREACHABLE)
    return ConnectionFailed(reason, f"{address}: {os.strerror(code)}")


def shortage(detail: str) -> ConnectionFailed:
    """Of descriptors, ports or memory of this host."""
    return ConnectionFailed(Reason.LIMIT_HOST, detail, ended_by=EndedBy.LIMIT)


def _has_source(address: Address) -> bool:
    """Whether this host has an address to reach `address` from; without one the kernel says EADDRNOTAVAIL too."""
    family = socket.AF_INET6 if address.is_v6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        return not probe.connect_ex((address.host, address.port))


def can_mark(mark: int) -> bool:
    """Whether this process may set SO_MARK (CAP_NET_ADMIN or CAP_NET_RAW); if not, the gid alone keeps us out."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        except PermissionError:
            return False
    return True


def can_be_transparent() -> bool:
    """Whether this process may set IP_TRANSPARENT: CAP_NET_ADMIN or CAP_NET_RAW."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            make_transparent(probe)
        except PermissionError:
            return False
    return True


def is_transparent(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(*_TRANSPARENT[sock.family]))


def reset(sock: socket.socket) -> None:
    """Closes with RST, so that the peer sees a failure and not an end. Nothing if it is closed already."""
    if sock.fileno() == -1:
        return
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
    except OSError:
        pass
    sock.close()


def was_reset(sock: socket.socket) -> bool:
    """Whether the peer has already given up, looked at without taking a byte."""
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return False


def _accept_some(listener: socket.socket, carry: Callable[[socket.socket, Address], object], most: int) -> int:
    """Takes up to `most` that wait. The errno for which none can be taken, or 0."""
    for _ in range(most):
        try:
            sock, peer = listener.accept()
        except BlockingIOError:
            break
        except OSError as error:
            if error.errno in _OF_ONE_CONNECTION:
                continue
            return error.errno or errno.EIO
        sock.setblocking(False)
        _spread(sock)
        carry(sock, peer_address(peer))
    return 0


def make_transparent(sock: socket.socket) -> None:
    """IP_TRANSPARENT of ip(7). Raises PermissionError."""
    sock.setsockopt(*_TRANSPARENT[sock.family], 1)


def _socket(family: int, mark: int) -> socket.socket:
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise shortage(f"cannot make a socket: {error.strerror}") from error
    if mark:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    return sock


def _begin(sock: socket.socket, address: Address) -> int:
    """The errno of a connect that has begun: EALREADY while it goes on."""
    code = sock.connect_ex((address.host, address.port))
    if code == errno.EINPROGRESS:
        # To this very host the handshake is over when the call returns, and only a second one says so.
        code = sock.connect_ex((address.host, address.port))
    return code


def _dial_as(source: str, address: Address, family: int, mark: int) -> tuple[socket.socket, int]:
    """As `_begin`, in the name of `source`, from a port that its own programs hardly choose.

    The kernel cannot tell a connection that we make in a client's name from one that the client itself makes from the
    same port: such a one would never come up.
    """
    for attempt in range(_SOURCE_PORT_TRIES):
        sock = _socket(family, mark)
        try:
            make_transparent(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port serves one connection to each address
            sock.bind((source, random.choice(_SOURCE_PORTS)))
            code = _begin(sock, address)
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRINUSE and attempt < _SOURCE_PORT_TRIES - 1:
                continue
            why = f"cannot speak to the application as {source}: {error.strerror}"
            raise ConnectionFailed(Reason.INTERNAL, why) from error
        if code != errno.EADDRNOTAVAIL:
            return sock, code
        sock.close()
    raise shortage(f"no port is free to speak to {address} as {source}")


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_COUNT)
    _spread(sock)


def _spread(sock: socket.socket) -> None:
    """Keepalive times of its own; what is accepted has the listener's."""
    fd = sock.fileno()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE[fd % len(_KEEPALIVE_IDLE)])
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL[fd % len(_KEEPALIVE_INTERVAL)])
