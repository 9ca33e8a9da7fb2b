"""A small admin socket that answers with prepared structs, and the structs that the tests of the commands share."""

import os
import selectors
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue

import msgspec

from meshnet.errors import EndedBy, Phase, Reason
from meshnet.model.admin import ConnectionList, ConnectionListMetadata, ListConnections, Request, decode_request
from meshnet.model.connection import (
    Attempt,
    Connection,
    Direction,
    Peer,
    ReasonView,
    Security,
    State,
    TlsView,
)

ROOT = Path(__file__).parents[2]
WEB = "spiffe://prod/ns/default/sa/web"
API = "spiffe://prod/ns/default/sa/api"


class Sidecar:
    """Reads one request a connection, writes `answers`, and hangs up; with `hold` it waits for the client to do so.

    Who asks for a list of connections gets `connections` instead, once there is one, or one of `parts` after the other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: list[bytes] = []
        self.connections: ConnectionList | None = None
        self.parts: list[bytes] = []  # of a list of connections, each an answer
        self.hold = False
        self.requests: SimpleQueue[Request] = SimpleQueue()
        self.later: SimpleQueue[bytes | None] = SimpleQueue()  # while holding: more lines, None to hang up
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def will_answer(self, *structs: msgspec.Struct) -> None:
        self.answers = [msgspec.json.encode(struct) for struct in structs]

    def asked(self) -> Request:
        """The next request that came in; waits for it."""
        return self.requests.get(timeout=10)

    def close(self) -> None:
        self.later.put(None)
        self._stop.close()
        self._thread.join(timeout=10)
        self._listener.close()
        self._stopped.close()
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._stopped, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                if self._stopped in ready:
                    return
                client, _ = self._listener.accept()
                with client, client.makefile("rb") as lines:
                    self._answer(client, lines.readline())

    def _answer(self, client: socket.socket, request: bytes) -> None:
        if not request:
            return
        asked = decode_request(request)
        self.requests.put(asked)
        answers = self.answers
        if isinstance(asked, ListConnections) and self.connections is not None:
            answers = [msgspec.json.encode(self.connections)]
        if isinstance(asked, ListConnections) and self.parts:
            answers = [self.parts.pop(0)]
        try:
            for line in answers:
                client.sendall(line + b"\n")
            while self.hold and (late := self.later.get()) is not None:
                client.sendall(late + b"\n")
        except BrokenPipeError:
            return  # the command has ended before we did


# Root passes every file mode; without these two capabilities it is a user like any other.
WITHOUT_POWERS = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


def run_meshnet(*args: str, powers: bool = True) -> subprocess.Popen[str]:
    """A real process, started as the installed entry point would; `powers=False`: file modes hold for root as well."""
    prefix = WITHOUT_POWERS if os.getuid() == 0 and not powers else ()
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "meshnet_cli.main", *args],
        cwd=ROOT,
        env={**clean_environment(), "PYTHONPATH": "cli:init:."},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def clean_environment() -> dict[str, str]:
    """Without what the person who runs the tests has set for the commands."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MESHNET_", "NO_COLOR"))}


OPEN = Connection(
    id="k7f2",
    direction=Direction.OUTBOUND,
    state=State.OPEN,
    source=Peer(address="10.9.0.2:41000", identity=WEB, service="web"),
    destination=Peer(address="10.9.0.3:8080", identity=API, service="api:8080"),
    original_destination="10.96.0.12:8080",
    endpoint="10.9.0.3:8080",
    tls=TlsView(
        mode=Security.MTLS, version="TLSv1.3", cipher="TLS_AES_128_GCM_SHA256", peer_identity=API, handshake_ms=2.25
    ),
    relay="python",
    attempts=(Attempt(endpoint="10.9.0.3:8080", result="ok", ms=3.4),),
    bytes_sent=1_200_000,
    bytes_received=88_000,
    opened_at="2026-01-02T03:04:05Z",
    duration_ms=134_000.0,
    connect_ms=3.4,
    idle_ms=1_500.0,
    trace=(
        "capture: outbound from 10.9.0.2:41000 to 10.96.0.12:8080",
        "service: api:8080",
        "attempt 1: 10.9.0.3:8080 ok after 3.4 ms",
        "now: open",
    ),
)
INBOUND = Connection(
    id="k7f9",
    direction=Direction.INBOUND,
    state=State.HALF_IN,
    source=Peer(address="10.9.0.7:50000", identity=WEB),
    destination=Peer(address="10.9.0.2:9090", service="metrics:9090"),
    original_destination="10.9.0.2:9090",
    endpoint="127.0.0.1:9090",
    tls=TlsView(mode=Security.MTLS, peer_identity=WEB),
    policy="default/web-to-metrics",
    relay="python",
    bytes_sent=4_100,
    bytes_received=999,
    opened_at="2026-01-02T03:04:10Z",
    duration_ms=12_900.0,
)
PLAIN = Connection(
    id="k801",
    direction=Direction.OUTBOUND,
    state=State.OPEN,
    source=Peer(address="10.9.0.2:41001", service="web"),
    destination=Peer(address="10.9.0.4:5432", service="db:5432"),
    original_destination="10.9.0.4:5432",
    endpoint="10.9.0.4:5432",
    tls=TlsView(mode=Security.PLAIN),
    relay="python",
    bytes_sent=0,
    bytes_received=90_000,
    opened_at="2026-01-02T03:05:00Z",
    duration_ms=400.0,
)
REFUSED = Connection(
    id="k802",
    direction=Direction.OUTBOUND,
    state=State.REFUSED,
    source=Peer(address="10.9.0.2:41002", service="web"),
    destination=Peer(address="10.96.0.13:9000", service="pay:9000"),
    original_destination="10.96.0.13:9000",
    attempts=(
        Attempt(endpoint="10.9.0.5:9000", result="connect.timeout", ms=2000.0),
        Attempt(endpoint="10.9.0.6:9000", result="connect.refused", ms=0.42, detail="nothing listens there"),
    ),
    opened_at="2026-01-02T03:05:30Z",
    closed_at="2026-01-02T03:05:32Z",
    duration_ms=2_010.0,
    reason=ReasonView(
        code=Reason.BREAKER_OPEN,
        message="both endpoints of pay:9000 are ejected; next probe in 24s",
        ended_by=EndedBy.LIMIT,
        phase=Phase.CONNECT,
    ),
    trace=(
        "capture: outbound from 10.9.0.2:41002 to 10.96.0.13:9000",
        "service: pay:9000",
        "attempt 1: 10.9.0.5:9000 connect.timeout after 2000 ms",
        "attempt 2: 10.9.0.6:9000 connect.refused after 0.42 ms: nothing listens there",
        "end: breaker.open by limit in phase connect: both endpoints of pay:9000 are ejected; next probe in 24s",
    ),
)
NOW = "2026-01-02T03:06:00Z"


def listing(*connections: Connection) -> ConnectionList:
    metadata = ConnectionListMetadata(node="vm1", generated_at=NOW, open=3, failed=1, plaintext=1)
    return ConnectionList(metadata=metadata, items=connections)


def all_four() -> ConnectionList:
    return listing(OPEN, INBOUND, PLAIN, REFUSED)


def block(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
