import json

import msgspec
import pytest

from meshnet.model.connection import Peer, State
from tests.cli.conftest import Meshnet
from tests.cli.sidecar import INBOUND, OPEN, PLAIN, REFUSED, Sidecar, all_four, listing


def test_rows_become_counts_of_what_they_have_in_common(meshnet: Meshnet, sidecar: Sidecar) -> None:
    other = msgspec.structs.replace(OPEN, id="k7f3", bytes_sent=300_000, state=State.CONNECTING)
    sidecar.will_answer(listing(OPEN, PLAIN, other, REFUSED))
    assert meshnet("conns", "--by", "service").output == (
        "SERVICE   CONNS  OPEN  FAILED  TX    RX\n"
        "api:8080  2      2     0       1.5M  176K\n"
        "db:5432   1      1     0       0     90K\n"
        "pay:9000  1      0     1       0     0\n"
    )
    assert meshnet("conns", "--by", "reason,state", "--no-header", "--sort", "failed", "--top", "2").output == (
        "breaker.open  refused  1  0  1  0     0\n-             open     2  2  0  1.2M  178K\n"
    )


def test_json_has_each_group_with_its_keys(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(all_four())
    told = json.loads(meshnet("conns", "--by", "dir,tls", "-o", "json").output)
    assert told["kind"] == "ConnectionGroupList"
    assert told["items"][0] == {
        "by": {"dir": "in", "tls": "mtls"},
        "connections": 1,
        "open": 1,
        "failed": 0,
        "bytesSent": 4100,
        "bytesReceived": 999,
    }
    lines = meshnet("conns", "--by", "dir", "-o", "jsonl").output.splitlines()
    assert [json.loads(line)["connections"] for line in lines] == [3, 1]
    assert meshnet("conns", "--by", "dir,tls", "-o", "name").output.splitlines()[0] == "in mtls"


def test_from_and_to_are_hosts_where_nobody_has_a_name(meshnet: Meshnet, sidecar: Sidecar) -> None:
    nameless = Peer(address="10.9.0.8:1234")
    one = msgspec.structs.replace(OPEN, source=nameless, destination=Peer(), endpoint="")
    two = msgspec.structs.replace(one, source=msgspec.structs.replace(nameless, address="[fd00::8]:9"))
    sidecar.will_answer(listing(one, two, one, INBOUND))
    assert meshnet("conns", "--by", "from,to", "-o", "name").output.splitlines() == [
        "10.9.0.8 10.96.0.12",
        "fd00::8 10.96.0.12",
        "web 127.0.0.1",
    ]


def test_filters_come_first_and_exit_code_is_of_what_matches(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(all_four())
    result = meshnet("conns", "--failed", "--by", "service", "-o", "name", "--exit-code")
    assert (result.exit_code, result.output) == (1, "pay:9000\n")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--by colour", "'colour' is not one of service, endpoint, from"),
        ("--by service --sort age", "--sort age does not go with --by"),
        ("--sort failed", "--sort failed goes only with --by"),
        ("--by service --columns id", "--columns goes without --by"),
        ("--by service -f", "--follow goes with filters"),
    ],
)
def test_what_does_not_go_together_is_a_usage_error(meshnet: Meshnet, flags: str, words: str) -> None:
    result = meshnet("conns", *flags.split())
    assert result.exit_code == 2
    assert words in result.stderr
