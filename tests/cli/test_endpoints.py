import json

import msgspec
import pytest

from meshnet.model.admin import EndpointList, EndpointView, ListEndpoints
from tests.cli.conftest import Meshnet
from tests.cli.sidecar import Sidecar

API = "spiffe://prod/ns/default/sa/api"
HEALTHY = EndpointView(
    service="api:8080",
    endpoint="10.9.0.3:8080",
    tunnel="meshnet",
    identity=API,
    weight=1,
    breaker="closed",
    connections=9,
    pending=0,
    failures=0,
)
OPEN = EndpointView(
    service="api:8080",
    endpoint="10.9.0.7:8080",
    tunnel="meshnet",
    identity=API,
    weight=2,
    breaker="open",
    connections=0,
    pending=1,
    failures=5,
    open_for_seconds=24.0,
    last_error="timed out",
)
HALF_OPEN = EndpointView(
    service="db:5432",
    endpoint="10.9.0.4:5432",
    tunnel="none",
    identity="",
    weight=1,
    breaker="half-open",
    connections=12,
    pending=0,
    failures=6,
    last_error="refused",
)
ALL = EndpointList(items=(HEALTHY, OPEN, HALF_OPEN))


def test_the_table_says_which_endpoints_get_no_connections_and_why(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(ALL)
    result = meshnet("endpoints")
    assert sidecar.asked() == ListEndpoints()
    assert result.exit_code == 0
    assert result.output == (
        "SERVICE   ENDPOINT       TUNNEL   WEIGHT  STATE      CONNS  PENDING  FAILS  OPEN_FOR  EJECTED_FOR  CHECK"
        "  LAST_ERROR\n"
        "api:8080  10.9.0.3:8080  meshnet  1       healthy    9      0        0      -         -            -      -\n"
        "api:8080  10.9.0.7:8080  meshnet  2       open       0      1        5      24s       -            -"
        "      timed out\n"
        "db:5432   10.9.0.4:5432  none     1       half-open  12     0        6      -         -            -"
        "      refused\n"
        "1 of 3 healthy, 1 open, 1 half-open.\n"
    )


def test_a_name_is_beside_its_address_and_stands_alone_while_it_has_none(meshnet: Meshnet, sidecar: Sidecar) -> None:
    named = msgspec.structs.replace(HALF_OPEN, dns_name="db.example.com")
    unresolved = msgspec.structs.replace(
        HEALTHY, endpoint="", dns_name="api.example.com", dns_problem="there is no such name"
    )
    sidecar.will_answer(EndpointList(items=(named, unresolved)))
    result = meshnet("endpoints", "--columns", "endpoint,state,last_error")
    assert result.output == (
        "ENDPOINT                        STATE       LAST_ERROR\n"
        "10.9.0.4:5432 (db.example.com)  half-open   refused\n"
        "(api.example.com)               unresolved  there is no such name\n"
        "0 of 2 healthy, 1 half-open.\n"
    )
    sidecar.will_answer(EndpointList(items=(named, unresolved)))
    assert meshnet("endpoints", "-o", "name").output == "10.9.0.4:5432\napi.example.com\n"


def test_what_checks_say_is_told_and_counted(meshnet: Meshnet, sidecar: Sidecar) -> None:
    passing = msgspec.structs.replace(HEALTHY, check="passing", last_error="long ago")
    failing = msgspec.structs.replace(HEALTHY, check="failing", check_error="refused", last_error="long ago")
    sidecar.will_answer(EndpointList(items=(passing, failing)))
    result = meshnet("endpoints", "--columns", "state,check,last_error")
    assert result.output == (
        "STATE    CHECK    LAST_ERROR\n"
        "healthy  passing  long ago\n"
        "healthy  failing  refused\n"
        "1 of 2 healthy, 1 failing checks.\n"
    )


def test_an_open_breaker_and_an_ejection_are_two_states_and_have_two_columns(
    meshnet: Meshnet, sidecar: Sidecar
) -> None:
    ejected = msgspec.structs.replace(HEALTHY, ejected_for_seconds=45.0)
    both = msgspec.structs.replace(OPEN, ejected_for_seconds=45.0)
    probed = msgspec.structs.replace(HALF_OPEN, ejected_for_seconds=45.0)
    sidecar.will_answer(EndpointList(items=(OPEN, ejected, both, probed)))
    assert meshnet("endpoints", "--columns", "state,open_for,ejected_for").output == (
        "STATE    OPEN_FOR  EJECTED_FOR\n"
        "open     24s       -\n"
        "ejected  -         45s\n"
        "open     24s       45s\n"
        "ejected  -         45s\n"
        "0 of 4 healthy, 2 open, 2 ejected.\n"
    )


def test_what_gets_nothing_new_by_its_weight_is_draining(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(EndpointList(items=(HEALTHY, msgspec.structs.replace(HEALTHY, weight=0))))
    result = meshnet("endpoints", "--columns", "weight,state")
    assert result.output == "WEIGHT  STATE\n1       healthy\n0       draining\n1 of 2 healthy, 1 draining.\n"


def test_wide_adds_identities(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(ALL)
    last_cells = [line.split()[-1] for line in meshnet("endpoints", "-o", "wide").output.splitlines()[:-1]]
    assert last_cells == ["IDENTITY", API, API, "-"]


def test_json_jsonl_and_name_carry_the_same_endpoints(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(ALL)
    assert json.loads(meshnet("endpoints", "-o", "json").output) == json.loads(msgspec.json.encode(ALL))
    lines = meshnet("endpoints", "-o", "jsonl").output.splitlines()
    assert [msgspec.json.decode(line, type=EndpointView) for line in lines] == [HEALTHY, OPEN, HALF_OPEN]
    assert [json.loads(line)["state"] for line in lines] == ["healthy", "open", "half-open"]
    assert meshnet("endpoints", "-o", "name").output == "10.9.0.3:8080\n10.9.0.7:8080\n10.9.0.4:5432\n"


@pytest.mark.parametrize(
    ("key", "first"), [("conns", "10.9.0.4:5432"), ("pending", "10.9.0.7:8080"), ("fails", "10.9.0.4:5432")]
)
def test_sort_puts_the_largest_first(meshnet: Meshnet, sidecar: Sidecar, key: str, first: str) -> None:
    sidecar.will_answer(ALL)
    assert meshnet("endpoints", "--sort", key, "-o", "name").output.split()[0] == first


def test_a_service_can_be_named_and_an_unknown_one_is_an_error(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(EndpointList())
    result = meshnet("endpoints", "nope")
    assert sidecar.asked() == ListEndpoints(service="nope")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: no endpoint of 'nope'\n"
        "why: the sidecar knows no such service, or it has no endpoints\n"
        "fix: meshnet endpoints lists them all\n"
    )


def test_hostile_names_are_spelled_out(meshnet: Meshnet, sidecar: Sidecar) -> None:
    evil = msgspec.structs.replace(HEALTHY, service="a\x1b[2J", last_error="x\ny")
    sidecar.will_answer(EndpointList(items=(evil,)))
    result = meshnet("endpoints", "--columns", "service,last_error", "--no-header")
    assert result.output == "a\\x1b[2J  x\\ny\n"
