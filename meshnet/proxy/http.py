"""HTTP/1.1 as the sidecar itself speaks it: little questions with little answers."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import h11
import trio

_RECEIVE_SIZE = 8192
_MOST_BODY = 10 << 10  # bytes of an answer that are read; a kubelet reads as many (kubernetes, pkg/probe/http)


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes
    content_type: str = "text/plain"


async def serve(
    stream: trio.SocketStream,
    answer: Callable[[h11.Request], Awaitable[Answer]],
    idle_timeout: float,
    *,
    once: bool = False,
) -> None:
    """Serves one connection, GET after GET, until the client ends it or is silent for `idle_timeout` seconds.

    `once`: until the first answer.
    """
    connection = h11.Connection(h11.SERVER)
    async with stream:
        try:
            while True:
                with trio.fail_after(idle_timeout):
                    request = await _next_event(connection, stream)
                    if not isinstance(request, h11.Request):
                        return
                    while not isinstance(await _next_event(connection, stream), h11.EndOfMessage):
                        pass
                if request.method in (b"GET", b"HEAD"):
                    said = await answer(request)
                else:
                    said = Answer(405, b"only GET\n")
                with trio.fail_after(idle_timeout):
                    await _send(connection, stream, said, bare=request.method == b"HEAD", last=once)
                if once or connection.our_state is h11.MUST_CLOSE:
                    return
                connection.start_next_cycle()
        except (h11.RemoteProtocolError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            return


async def get(
    stream: trio.abc.Stream, target: str, headers: Iterable[tuple[str, str]]
) -> tuple[Answer, dict[str, str]]:
    """The answer to one GET, the beginning of its body, and its headers by lower-case name.

    Raises h11.RemoteProtocolError if that is no HTTP, and what the stream raises.
    """
    connection = h11.Connection(h11.CLIENT)
    request = h11.Request(method="GET", target=target, headers=[*headers, ("connection", "close")])
    await stream.send_all((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
    head: h11.Response | None = None
    body = bytearray()
    while len(body) < _MOST_BODY:
        event = await _next_event(connection, stream)
        if isinstance(event, h11.Response):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
            break
    if head is None:
        raise h11.RemoteProtocolError("the connection ended before an answer")
    found = {name.decode("ascii"): value.decode("latin-1") for name, value in head.headers}
    return Answer(head.status_code, bytes(body[:_MOST_BODY])), found


async def _next_event(connection: h11.Connection, stream: trio.abc.Stream) -> object:
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(bytes(await stream.receive_some(_RECEIVE_SIZE)))
    return event


async def _send(connection: h11.Connection, stream: trio.SocketStream, said: Answer, *, bare: bool, last: bool) -> None:
    """`bare`: the head alone, which still says how long the body would be (RFC 9110, 9.3.2)."""
    headers = [("content-type", said.content_type), ("content-length", str(len(said.body)))]
    if last:
        headers.append(("connection", "close"))
    data = connection.send(h11.Response(status_code=said.status, headers=headers)) or b""
    if not bare:
        data += connection.send(h11.Data(data=said.body)) or b""
    data += connection.send(h11.EndOfMessage()) or b""
    await stream.send_all(data)
