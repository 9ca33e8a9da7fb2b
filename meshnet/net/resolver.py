"""The addresses of a DNS name, as /etc/hosts and the servers of /etc/resolv.conf say; the proxy's own traffic.

Rules let a marked socket pass, so that asking a server by TCP does not come back to the proxy.
"""

import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dns.asyncresolver
import dns.exception
import dns.inet
import dns.rdatatype
import dns.resolver
import trio
from dns._asyncbackend import (  # dns.asyncbackend has them too, but does not tell a type checker
    Backend,
    DatagramSocket,
    StreamSocket,
)
from dns.rdatatype import RdataType

from meshnet.codec.hosts import hosts_of
from meshnet.decide.names import Lookup, usable

_PATIENCE = 5.0  # seconds, for all servers and all names of the search path together
_HOSTS_TTL = 10.0  # seconds; nothing says when the file changes


@dataclass(frozen=True, slots=True)
class Resolver:
    """Reads both files anew for each question: they change with the network."""

    resolv_conf: str
    hosts_file: str
    mark: int

    async def look_up(self, name: str) -> Lookup:
        """Never raises for what files, servers and the network do; that is the problem of the Lookup."""
        listed, asker = await trio.to_thread.run_sync(self._read, name)
        if listed:
            return _routed(Lookup(listed, _HOSTS_TTL))
        if isinstance(asker, str):
            return Lookup(problem=asker)
        answers: dict[RdataType, dns.resolver.Answer | str] = {}

        async def ask(kind: RdataType) -> None:
            answers[kind] = await _ask(asker, name, kind, self.mark)

        async with trio.open_nursery() as nursery:
            for kind in (dns.rdatatype.A, dns.rdatatype.AAAA):
                nursery.start_soon(ask, kind)
        return _routed(_lookup(answers.values()))

    def _read(self, name: str) -> tuple[tuple[str, ...], dns.asyncresolver.Resolver | str]:
        """What the file of hosts says, and who else is to be asked, or why nobody can be."""
        try:
            text = Path(self.hosts_file).read_text(errors="replace")
        except OSError:
            text = ""  # there need be none
        try:
            asker = dns.asyncresolver.Resolver(self.resolv_conf)
        except (OSError, ValueError, dns.exception.DNSException) as error:
            return usable(hosts_of(text, name)), f"{self.resolv_conf}: {error}"
        return usable(hosts_of(text, name)), asker


async def _ask(asker: dns.asyncresolver.Resolver, name: str, kind: RdataType, mark: int) -> dns.resolver.Answer | str:
    """An answer, in which there may be no address; or why there is none."""
    try:
        return await asker.resolve(
            name, kind, raise_on_no_answer=False, lifetime=_PATIENCE, search=True, backend=_Backend(mark)
        )
    except dns.resolver.NXDOMAIN:
        return "there is no such name"
    except dns.exception.Timeout:
        return f"no server answered within {_PATIENCE:g} s"
    except dns.resolver.NoNameservers as error:
        return _whose_fault(error)
    except dns.exception.DNSException as error:
        return str(error)


def _whose_fault(error: dns.resolver.NoNameservers) -> str:
    """What each server did, without the question."""
    said = dict.fromkeys(f"{server}: {failure}" for server, _, _, failure, _ in error.kwargs.get("errors", ()))
    return "; ".join(each.removeprefix("Do53:") for each in said) or "no server could be asked"


def _lookup(answers: Iterable[dns.resolver.Answer | str]) -> Lookup:
    found: list[str] = []
    ttls: list[float] = []
    problems: list[str] = []
    exists = False
    for answer in answers:
        if isinstance(answer, str):
            problems.append(answer)
        elif answer.rrset is not None:
            found += [record.to_text() for record in answer.rrset]
            ttls.append(answer.chaining_result.minimum_ttl)
        else:
            exists = True
    hosts = usable(found)
    # A server that knows a name by one kind of address and denies it by the other is mistaken, but not out of order.
    failed = [problem for problem in problems if problem != "there is no such name"]
    if hosts:
        return Lookup(hosts, min(ttls), failed[0] if failed else "")
    if failed:
        return Lookup(problem=failed[0])
    if found:
        return Lookup(problem=f"{found[0]} is no address of a host")
    return Lookup(problem="it has no address" if exists else "there is no such name")


def _routed(lookup: Lookup) -> Lookup:
    """Without the IPv6 addresses to which there is no way, where there are others: most hosts have no IPv6."""
    hosts = tuple(host for host in lookup.hosts if ":" not in host or _has_route(host))
    return Lookup(hosts or lookup.hosts, lookup.ttl, lookup.problem)


def _has_route(host: str) -> bool:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
        except OSError:
            return False
    return True


class _Backend(Backend):
    """trio, with sockets that are marked as the proxy's own."""

    def __init__(self, mark: int) -> None:
        self._mark = mark

    def name(self) -> str:
        return "trio"

    def datagram_connection_required(self) -> bool:
        return True  # so a server where nobody listens is known at once, and others cannot answer for it

    async def make_socket(
        self,
        af: int,
        socktype: int,
        proto: int = 0,
        source: object = None,
        destination: Any = None,
        timeout: float | None = None,
        ssl_context: object = None,
        server_hostname: str | None = None,
    ) -> "_Datagrams | _Stream":
        sock = trio.socket.socket(af, socktype, proto)
        try:
            if self._mark:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, self._mark)
            with _within(timeout):
                await sock.connect(dns.inet.low_level_address_tuple(destination, af))
        except BaseException:
            sock.close()
            raise
        return _Datagrams(sock) if socktype == socket.SOCK_DGRAM else _Stream(sock)

    async def sleep(self, interval: float) -> None:
        await trio.sleep(interval)


class _Datagrams(DatagramSocket):
    def __init__(self, sock: trio.socket.SocketType) -> None:
        super().__init__(sock.family, sock.type)
        self._sock = sock

    async def sendto(self, what: bytes, destination: object, timeout: float | None) -> int:
        with _within(timeout):
            return await self._sock.send(what)

    async def recvfrom(self, size: int, timeout: float | None) -> tuple[bytes, Any]:
        with _within(timeout):
            return await self._sock.recvfrom(size)

    async def close(self) -> None:
        self._sock.close()


class _Stream(StreamSocket):
    def __init__(self, sock: trio.socket.SocketType) -> None:
        super().__init__(sock.family, sock.type)
        self._stream = trio.SocketStream(sock)

    async def sendall(self, what: bytes, timeout: float | None) -> None:
        with _within(timeout):
            await self._stream.send_all(what)

    async def recv(self, size: int, timeout: float | None) -> bytes:
        with _within(timeout):
            return bytes(await self._stream.receive_some(size))

    async def close(self) -> None:
        await self._stream.aclose()


@contextmanager
def _within(timeout: float | None) -> Iterator[None]:
    if timeout is None:
        yield
        return
    try:
        with trio.fail_after(timeout):
            yield
    except trio.TooSlowError:
        raise dns.exception.Timeout(timeout=timeout) from None  # type: ignore[no-untyped-call] # it says no types
