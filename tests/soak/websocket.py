"""WebSockets between a server and a client of PyPI's `websockets`: one connection for as long as it lasts."""

import hashlib
import logging
import threading
from contextlib import ExitStack

from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import connect
from websockets.sync.server import Server, ServerConnection, serve

from meshnet_cli.demo.world import Host
from tests.soak.talk import SECRET, SIZE

_PATIENCE = 15.0  # seconds for an answer or a pong: longer than a fault that nobody may notice
_PING_EVERY = 1.0

logging.getLogger("websockets").setLevel(logging.CRITICAL)  # connections that faults end are nobody's news here


class EchoServer:
    """Says again each message of each client, and pings them."""

    def __init__(self, host: Host, port: int) -> None:
        sock = host.open_socket()
        sock.bind(("0.0.0.0", port))
        sock.listen(128)
        self._server: Server = serve(
            _echo, sock=sock, ping_interval=_PING_EVERY, ping_timeout=_PATIENCE, close_timeout=1.0, compression=None
        )
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()


def _echo(client: ServerConnection) -> None:
    try:
        for message in client:
            client.send(message)
    except ConnectionClosed:
        pass  # a reset is an end like any other


class Conversation:
    """What comes back is compared by hash, as text and as bytes in turns. Raises OSError or EOFError."""

    def __init__(self, host: Host, address: str, port: int) -> None:
        sock = host.connect(address, port, timeout=10.0)
        with ExitStack() as stack:
            stack.callback(sock.close)
            try:
                self._client = stack.enter_context(
                    connect(
                        f"ws://{address}:{port}/",
                        sock=sock,
                        open_timeout=_PATIENCE,
                        ping_interval=_PING_EVERY,
                        ping_timeout=_PATIENCE,
                        close_timeout=1.0,
                        compression=None,
                    )
                )
            except WebSocketException as error:
                raise EOFError(f"no WebSocket: {error}") from None
            self._open = stack.pop_all()
        self._count = 0

    def say(self) -> None:
        self._count += 1
        data = SECRET + hashlib.shake_256(self._count.to_bytes(8, "big")).digest(SIZE)
        said = data if self._count % 2 else SECRET.decode() + data.hex()
        try:
            pong = self._client.ping()
            self._client.send(said)
            heard = self._client.recv(timeout=_PATIENCE)
            if not pong.wait(_PATIENCE):
                raise EOFError("no pong")
        except ConnectionClosed as error:
            raise EOFError(str(error)) from None
        if _digest(heard) != _digest(said):
            raise EOFError("what came back is not what was said")

    def close(self) -> None:
        self._open.close()


def _digest(message: str | bytes) -> tuple[type, bytes]:
    return type(message), hashlib.sha256(message.encode() if isinstance(message, str) else message).digest()
