"""The probe relay on port 15121: a kubelet asks here, and the sidecar asks the application itself.

A kubelet's own probe would be turned to the sidecar like any connection that comes in: mTLS would refuse it, and a TCP
probe would always succeed, for it is the sidecar that accepts (osm#4434, istio#4429). This one goes straight to the
application, at the address at which the relay was asked, and tells the truth. Only what the settings name is asked.
"""

import ssl
from collections.abc import Mapping
from urllib.parse import urljoin, urlsplit

import h11
import trio

from meshnet.errors import ConnectionFailed
from meshnet.model.address import Address
from meshnet.model.probe import Check, GrpcCheck, HttpCheck
from meshnet.net import sockets
from meshnet.proxy.grpc_health import serving_status
from meshnet.proxy.http import Answer, get, serve

_IDLE_TIMEOUT = 3.0  # seconds; a kubelet asks at once, and once per connection
_MOST_OPEN = 128
_MOST_REDIRECTS = 10  # as a kubelet (kubernetes, pkg/probe/http)
_SERVING = 1

_Failures = (ConnectionFailed, OSError, ssl.SSLError, h11.ProtocolError, trio.BrokenResourceError, ValueError)


class ProbeRelay:
    """`checks` by their names, `CONTAINER/livez`: each is asked for at that path."""

    def __init__(self, checks: Mapping[str, Check], mark: int) -> None:
        self._checks = checks
        self._mark = mark
        self._unverified = _unverified()
        self._open = 0

    async def handle(self, stream: trio.SocketStream) -> None:
        """Serves one HTTP/1.1 connection; closes it at once when there are too many."""
        if self._open >= _MOST_OPEN:
            await stream.aclose()
            return
        self._open += 1
        try:
            host = sockets.peer_address(stream.socket.getsockname()).host

            async def answer(request: h11.Request) -> Answer:
                return await self._answer(request, host)

            await serve(stream, answer, _IDLE_TIMEOUT)
        finally:
            self._open -= 1

    async def _answer(self, request: h11.Request, host: str) -> Answer:
        name = request.target.decode("ascii").partition("?")[0].removeprefix("/")
        check = self._checks.get(name)
        if check is None:
            return Answer(404, b"no such probe\n")
        agent = dict(request.headers).get(b"user-agent", b"kube-probe/meshnet").decode("latin-1")
        with trio.move_on_after(check.timeout):
            try:
                return await self._ask(check, host, agent)
            except _Failures as error:
                return Answer(503, f"{error}\n".encode())
        return Answer(504, f"no answer within {check.timeout} s\n".encode())

    async def _ask(self, check: Check, host: str, agent: str) -> Answer:
        if isinstance(check, HttpCheck):
            return await self._http(check, host, agent)
        async with await self._connect(Address(host, check.port), check.timeout) as stream:
            if isinstance(check, GrpcCheck):
                status = await serving_status(stream, str(Address(host, check.port)), check.service, agent)
                if status != _SERVING:
                    return Answer(503, f"the health service says {status}, not SERVING\n".encode())
        return Answer(200, b"ok\n")

    async def _http(self, check: HttpCheck, host: str, agent: str) -> Answer:
        """Redirects within the host are followed, one that leads elsewhere is an answer like any: so does a kubelet."""
        url = f"{check.scheme.lower()}://{Address(host, check.port)}{check.path}"
        for _ in range(_MOST_REDIRECTS):
            answer, headers = await self._get(url, check, agent)
            if answer.status not in (301, 302, 303, 307, 308) or "location" not in headers:
                return answer
            url = urljoin(url, headers["location"])
            if urlsplit(url).hostname != host or urlsplit(url).scheme not in ("http", "https"):
                return answer
        return Answer(503, f"more than {_MOST_REDIRECTS} redirects\n".encode())

    async def _get(self, url: str, check: HttpCheck, agent: str) -> tuple[Answer, dict[str, str]]:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        stream: trio.abc.Stream = await self._connect(Address(parts.hostname or "", port), check.timeout)
        if parts.scheme == "https":
            stream = trio.SSLStream(stream, self._unverified, https_compatible=True)
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            return await get(stream, target, _headers(check, parts.netloc, agent))
        finally:
            await trio.aclose_forcefully(stream)

    async def _connect(self, address: Address, timeout: float) -> trio.SocketStream:
        sock = await sockets.connect(address, mark=self._mark, timeout=timeout, local=True)
        return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


def _headers(check: HttpCheck, host: str, agent: str) -> list[tuple[str, str]]:
    """Those of the check, and a kubelet's own where it says nothing (kubernetes, pkg/probe/http/request.go).

    Of a kubelet's own an empty value takes one away.
    """
    given = {name.lower(): value for name, value in check.headers}
    usual = {"Host": host, "User-Agent": agent, "Accept": "*/*"}
    own = [(name, value) for name, value in usual.items() if name.lower() not in given]
    kept = [(name, value) for name, value in check.headers if value or name.title() not in usual]
    # HTTP/1.1 knows no request without a Host.
    return [*own, *kept] if given.get("host", host) else [("Host", host), *own, *kept]


def _unverified() -> ssl.SSLContext:
    """A probe asks whether the application answers; who it is nobody doubts on its own host."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
