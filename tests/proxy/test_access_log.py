"""The access log's thread: a reader that is stuck, slow or gone stops nobody."""

import fcntl
import json
import os
import time
from collections.abc import Iterator

import pytest

from meshnet.errors import EndedBy, Phase, Reason
from meshnet.model.connection import Connection, Direction, Peer, ReasonView, Security, State, TlsView
from meshnet.proxy.log import AccessLog, access_format
from tests.world import wait_for

F_GETPIPE_SZ = 1032  # <linux/fcntl.h>

ENDED = Connection(
    id="00000001",
    direction=Direction.OUTBOUND,
    state=State.CLOSED,
    source=Peer(address="10.0.0.1:1234", identity="spiffe://mesh.example/ns/default/sa/web"),
    destination=Peer(address="10.96.0.10:80", service="api:80"),
    endpoint="10.0.0.2:80",
    tls=TlsView(mode=Security.MTLS),
    bytes_sent=5,
    bytes_received=7,
    closed_at="2024-01-01T00:00:00.000Z",
    duration_ms=12.4,
    reason=ReasonView(code=Reason.PEER_RST, ended_by=EndedBy.SERVER, phase=Phase.DATA, message="so\nit\x1b[31m is"),
)


class Ended:
    """What the registry hands over."""

    def view(self) -> Connection:
        return ENDED


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            pass  # the test has closed it


def read_lines(descriptor: int, count: int) -> list[bytes]:
    data = b""
    while data.count(b"\n") < count:
        data += os.read(descriptor, 65536)
    return data.splitlines()


def test_a_line_of_json_is_the_whole_record(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    with AccessLog("json", writer) as log:
        log(Ended())
        (line,) = read_lines(reader, 1)
    told = json.loads(line)
    assert told["reason"] == {
        "code": "peer.rst",
        "endedBy": "server",
        "phase": "data",
        "message": "so\nit\x1b[31m is",
    }
    assert (told["bytesSent"], told["endpoint"]) == (5, "10.0.0.2:80")


def test_a_line_of_text_is_one_line_that_a_terminal_can_show(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    with AccessLog("text", writer) as log:
        log(Ended())
        (line,) = read_lines(reader, 1)
    assert line.startswith(
        b"2024-01-01T00:00:00.000Z 00000001 outbound spiffe://mesh.example/ns/default/sa/web -> api:80"
    )
    assert b"10.0.0.2:80 mtls sent=5 received=7 12ms peer.rst by server in data" in line


def test_what_waits_is_written_before_the_log_closes(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    with AccessLog("json", writer) as log:
        for _ in range(50):
            log(Ended())
    assert len(read_lines(reader, 50)) == 50


def test_a_stuck_reader_stops_nobody_and_is_told_how_many_lines_it_lost(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    room = fcntl.fcntl(writer, F_GETPIPE_SZ)
    os.write(writer, b"\n" * room)  # full
    with AccessLog("json", writer) as log:
        log(Ended())
        wait_for(lambda: not log._waiting)  # the thread has it, and is stuck in its write
        begun = time.monotonic()
        for _ in range(10_500):
            log(Ended())
        assert time.monotonic() - begun < 1.0
        os.read(reader, room)
        lines = read_lines(reader, 10_002)
    assert json.loads(lines[-1]) == {"kind": "LinesLost", "count": 500}


def test_a_reader_that_hung_up_stops_nobody(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.close(reader)
    with AccessLog("json", writer) as log:
        log(Ended())
        wait_for(lambda: not log._thread.is_alive())
        for _ in range(20_000):
            log(Ended())


def test_auto_means_json_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert access_format("auto") == "json"
    assert access_format("text") == "text"
    assert access_format("off") == "off"
