"""/metrics, /healthz and /readyz on port 15120."""

import h11
import trio
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from meshnet.proxy.admin import Answers

_IDLE_TIMEOUT = 30.0  # seconds a client may be silent
_RECEIVE_SIZE = 8192

Answer = tuple[int, str, bytes]


class HealthServer:
    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    async def handle(self, stream: trio.SocketStream) -> None:
        """Serves one HTTP/1.1 connection, request after request."""
        connection = h11.Connection(h11.SERVER)
        async with stream:
            try:
                while True:
                    with trio.fail_after(_IDLE_TIMEOUT):
                        request = await _next_event(connection, stream)
                        if not isinstance(request, h11.Request):
                            return
                        while not isinstance(await _next_event(connection, stream), h11.EndOfMessage):
                            pass
                        status, content_type, body = await self._answer(request.method, request.target)
                        await _send(connection, stream, status, content_type, body, bare=request.method == b"HEAD")
                    if connection.our_state is h11.MUST_CLOSE:
                        return
                    connection.start_next_cycle()
            except (h11.RemoteProtocolError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
                return

    async def _answer(self, method: bytes, target: bytes) -> Answer:
        path = target.partition(b"?")[0]
        if method not in (b"GET", b"HEAD"):
            return 405, "text/plain", b"only GET\n"
        if path == b"/metrics":
            return 200, CONTENT_TYPE_LATEST, await self._answers.scrape()
        if path == b"/healthz":
            return 200, "text/plain", b"ok\n"
        if path == b"/readyz":
            problems = await self._answers.not_ready_because()
            return (
                (503, "text/plain", "\n".join(problems).encode() + b"\n") if problems else (200, "text/plain", b"ok\n")
            )
        return 404, "text/plain", b"try /metrics, /healthz or /readyz\n"


async def _next_event(connection: h11.Connection, stream: trio.SocketStream) -> object:
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(await stream.receive_some(_RECEIVE_SIZE))
    return event


async def _send(
    connection: h11.Connection, stream: trio.SocketStream, status: int, content_type: str, body: bytes, *, bare: bool
) -> None:
    """`bare`: the head alone, which still says how long the body would be (RFC 9110, 9.3.2)."""
    headers = [("content-type", content_type), ("content-length", str(len(body)))]
    data = connection.send(h11.Response(status_code=status, headers=headers)) or b""
    if not bare:
        data += connection.send(h11.Data(data=body)) or b""
    data += connection.send(h11.EndOfMessage()) or b""
    await stream.send_all(data)
