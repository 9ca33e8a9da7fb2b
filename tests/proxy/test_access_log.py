"""The access log's thread: a reader that is stuck, slow or gone stops nobody."""

import fcntl
import itertools
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from meshnet.errors import EndedBy, Phase, Reason
from meshnet.model.connection import Connection, Direction, Peer, ReasonView, Security, State, TlsView
from meshnet.proxy.log import AccessLog, access_format
from tests.world import wait_for

F_SETPIPE_SZ, F_GETPIPE_SZ = 1031, 1032  # <linux/fcntl.h>
ROOT = Path(__file__).parents[2]

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


@dataclass(frozen=True)
class Ended:
    """What the registry hands over."""

    connection: Connection = ENDED

    def views(self) -> list[Connection]:
        return [self.connection]

    def lines(self) -> bytes:
        return msgspec.json.encode(self.connection) + b"\n"


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
        for _ in range(10_500):
            log(Ended())  # nobody reads: had it to wait for that, it would wait for ever
        os.read(reader, room)
        lines = read_lines(reader, 10_002)
    assert json.loads(lines[-1]) == {"kind": "LinesLost", "count": 500}


class Broken(Ended):
    def lines(self) -> bytes:
        raise ValueError("it cannot be told")


def test_what_cannot_be_made_into_lines_is_counted_as_lost(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    with AccessLog("json", writer) as log:
        log(Broken(), 3)
        log(Ended())
        lines = read_lines(reader, 2)
    assert {"kind": "LinesLost", "count": 3} in map(json.loads, lines)
    assert ENDED.id in [json.loads(line).get("id") for line in lines]


def test_a_reader_that_hung_up_stops_nobody(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.close(reader)
    with AccessLog("json", writer) as log:
        log(Ended())
        wait_for(lambda: not log._thread.is_alive())
        for _ in range(20_000):
            log(Ended())


# Logs lines of all lengths, short ones and such as are longer than PIPE_BUF, some at a time, once all are there.
WRITER = """
import sys
from meshnet.proxy.log import AccessLog
from tests.proxy.test_access_log import LINES, Ended, long
from tests.world import wait_for
who, lock = sys.argv[1], int(sys.argv[2])
print("ready", file=sys.stderr, flush=True)
sys.stdin.read()
with AccessLog("json", 1, lock) as log:
    for number in range(LINES):
        log(Ended(long(who, number)))
        if number % 20 == 0:
            wait_for(lambda: not log._waiting)
"""
LINES = 300


def run(code: str, *arguments: str, **popen: Any) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, cwd=ROOT, **popen)


def long(who: str, number: int) -> Connection:
    """As long as its number says."""
    return msgspec.structs.replace(ENDED, id=f"{who}-{number}", policy=who * (number * 37 % 9000))


def test_several_processes_on_one_pipe_tear_no_line(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    fcntl.fcntl(writer, F_SETPIPE_SZ, select.PIPE_BUF)  # every write has to wait for the reader
    lock = os.memfd_create("access-log")
    start, started = os.pipe()
    writers = [
        run(WRITER, who, str(lock), stdin=start, stdout=writer, stderr=subprocess.PIPE, pass_fds=(lock,))
        for who in "abc"
    ]
    os.close(lock)
    os.close(writer)
    os.close(start)
    for process in writers:
        assert process.stderr is not None
        with process.stderr:
            assert process.stderr.readline() == b"ready\n"
    os.close(started)
    with os.fdopen(os.dup(reader), "rb") as output:
        told = [msgspec.json.decode(line, type=Connection) for line in output]
    assert [process.wait(10) for process in writers] == [0, 0, 0]
    for who in "abc":
        assert [each for each in told if each.id.startswith(who)] == [long(who, number) for number in range(LINES)]
    turns = sum(one.id[0] != other.id[0] for one, other in itertools.pairwise(told))
    assert turns > 10, "nobody wrote while another did, which proves nothing"


FLOOD = """
import sys
from meshnet.proxy.log import AccessLog
from tests.proxy.test_access_log import Ended
with AccessLog("json", 1, int(sys.argv[1])) as log:
    for _ in range(500):
        log(Ended())
"""


def test_who_is_killed_leaves_whole_lines(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    fcntl.fcntl(writer, F_SETPIPE_SZ, select.PIPE_BUF)
    lock = os.memfd_create("access-log")
    process = run(FLOOD, str(lock), stdout=writer, pass_fds=(lock,))
    os.close(lock)
    os.close(writer)
    read_lines(reader, 5)
    process.kill()
    process.wait()
    with os.fdopen(os.dup(reader), "rb") as rest:
        assert rest.read()[-1:] in (b"\n", b"")


def test_auto_means_json_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert access_format("auto") == "json"
    assert access_format("text") == "text"
    assert access_format("off") == "off"
