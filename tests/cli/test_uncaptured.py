import json
import os
import socket

import pytest
from msgspec import structs

from meshnet.model.admin import ListUncaptured
from meshnet.model.connection import Direction
from meshnet.model.uncaptured import UncapturedConnection, UncapturedList
from tests.cli.conftest import Meshnet
from tests.cli.sidecar import Sidecar

LOGIN = UncapturedConnection(
    direction=Direction.INBOUND,
    client="10.9.0.8:40000",
    server="10.9.0.2:22",
    why="excluded",
    setting="capture.exclude_inbound_ports",
)
OLDER = UncapturedConnection(
    direction=Direction.OUTBOUND,
    client="10.9.0.2:41000",
    server="10.9.0.3:8080",
    why="opened-before",
    uid=1000,
    rtt_us=1234,
    retransmits=2,
    bytes_sent=4_100,
    bytes_received=0,
)
PAST = UncapturedConnection(
    direction=Direction.OUTBOUND, client="10.9.0.2:41001", server="10.9.0.3:9090", why="bypassed", bytes_sent=5
)


@pytest.fixture(autouse=True)
def answer(sidecar: Sidecar) -> None:
    sidecar.will_answer(UncapturedList(items=(LOGIN, OLDER, PAST)))


def test_the_table_says_why(meshnet: Meshnet, sidecar: Sidecar) -> None:
    result = meshnet("conns", "--uncaptured")
    assert sidecar.asked() == ListUncaptured()
    assert result.output == (
        "DIR  CLIENT          SERVER         WHY            SETTING\n"
        "in   10.9.0.8:40000  10.9.0.2:22    excluded       capture.exclude_inbound_ports\n"
        "out  10.9.0.2:41000  10.9.0.3:8080  opened-before  -\n"
        "out  10.9.0.2:41001  10.9.0.3:9090  bypassed       -\n"
        "3 not captured, 1 bypassed, 1 excluded, 1 opened-before.\n"
    )


@pytest.mark.parametrize(
    ("flags", "servers"),
    [
        ("--dir in", "10.9.0.2:22"),
        ("--port 8080 --port 22", "10.9.0.2:22 10.9.0.3:8080"),
        ("--to 10.9.0.3 --not --port 9090", "10.9.0.3:8080"),
        ("--from 10.9.0.0/29 --sort tx", "10.9.0.3:8080 10.9.0.3:9090"),
        ("--sort tx --top 1", "10.9.0.3:8080"),
    ],
)
def test_filters_go_by_address_port_and_direction(meshnet: Meshnet, flags: str, servers: str) -> None:
    result = meshnet("conns", "--uncaptured", "--no-header", "--columns", "server", *flags.split())
    assert result.output.split() == servers.split()


def test_wide_adds_what_the_kernel_knows(meshnet: Meshnet) -> None:
    header, row, totals = meshnet("conns", "--uncaptured", "-o", "wide", "--port", "8080").output.splitlines()
    shown = dict(zip(header.split(), row.split(), strict=True))
    assert {name: shown[name] for name in ("UID", "PROCESS", "RTT", "RETRANS", "TX", "RX")} == {
        "UID": "1000",
        "PROCESS": "-",
        "RTT": "1.2ms",
        "RETRANS": "2",
        "TX": "4.1K",
        "RX": "0",
    }
    assert totals == "1 not captured, 1 opened-before. 2 more do not match."


def test_processes_are_looked_up_by_the_command_itself(meshnet: Meshnet, sidecar: Sidecar) -> None:
    with socket.socket() as sock:
        inode = os.fstat(sock.fileno()).st_ino
        sidecar.will_answer(UncapturedList(items=(structs.replace(OLDER, inode=inode),)))
        (item,) = json.loads(meshnet("conns", "--uncaptured", "-o", "json").output)["items"]
    assert item["process"]["pid"] == os.getpid()


def test_exit_code_says_whether_one_matches(meshnet: Meshnet) -> None:
    assert meshnet("conns", "--uncaptured", "--exit-code").exit_code == 1
    assert meshnet("conns", "--uncaptured", "--exit-code", "--port", "1").exit_code == 0


@pytest.mark.parametrize(
    "flags", ["--all", "--since 5m", "--by service", "--kill --to 10.0.0.1 -y", "-f", "--sort age"]
)
def test_what_needs_a_record_does_not_go_with_it(meshnet: Meshnet, sidecar: Sidecar, flags: str) -> None:
    result = meshnet("conns", "--uncaptured", *flags.split())
    assert result.exit_code == 2
    assert "--uncaptured goes with filters" in result.stderr
    assert sidecar.requests.empty()
