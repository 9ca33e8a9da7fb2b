import json

import msgspec
import pytest

from meshnet.errors import Reason
from meshnet.model.admin import ExplainConnection, Refused
from meshnet.model.connection import Connection, ReasonView
from meshnet_cli.reasons import ADVICE
from tests.cli.conftest import Meshnet
from tests.cli.sidecar import INBOUND, OPEN, REFUSED, Sidecar, all_four, listing


@pytest.fixture(autouse=True)
def known(sidecar: Sidecar) -> None:
    """What the sidecar remembers when it is asked for all of it."""
    sidecar.connections = all_four()


def test_a_failed_connection_is_told_step_by_step_with_what_to_do(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(REFUSED)
    result = meshnet("explain", "k802")
    assert sidecar.asked() == ExplainConnection(id="k802")
    assert result.exit_code == 0
    assert result.output == (
        "k802  out  web -> pay:9000  refused  breaker.open\n"
        "\n"
        "  1  capture: outbound from 10.9.0.2:41002 to 10.96.0.13:9000\n"
        "  2  service: pay:9000\n"
        "  3  attempt 1: 10.9.0.5:9000 connect.timeout after 2000 ms\n"
        "  4  attempt 2: 10.9.0.6:9000 connect.refused after 0.42 ms: nothing listens there\n"
        "  5  end: breaker.open by limit in phase connect: both endpoints of pay:9000 are ejected; next probe in 24s\n"
        "\n"
        "client      10.9.0.2:41002\n"
        "service     pay:9000  10.96.0.13:9000\n"
        "bytes       0 sent, 0 received by the client\n"
        "time        2s from 2026-01-02T03:05:30Z  to 2026-01-02T03:05:32Z\n"
        "\n"
        "reason      breaker.open: both endpoints of pay:9000 are ejected; next probe in 24s\n"
        "ended       by limit, in phase connect\n"
        "cause       every endpoint failed so often of late that its breaker is open; it lets a probe through after a"
        " while\n"
        "what to do  meshnet endpoints pay:9000 shows each one's last error and when it is probed; mend the endpoint\n"
    )


def test_an_open_connection_has_nothing_to_be_done_about(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(OPEN)
    assert meshnet("explain", "k7f2").output == (
        "k7f2  out  web -> api:8080  open\n"
        "\n"
        "  1  capture: outbound from 10.9.0.2:41000 to 10.96.0.12:8080\n"
        "  2  service: api:8080\n"
        "  3  attempt 1: 10.9.0.3:8080 ok after 3.4 ms\n"
        "  4  now: open\n"
        "\n"
        "client      10.9.0.2:41000  spiffe://prod/ns/default/sa/web\n"
        "service     api:8080  10.96.0.12:8080\n"
        "endpoint    10.9.0.3:8080  spiffe://prod/ns/default/sa/api  mtls\n"
        "bytes       1.2M sent, 88K received by the client\n"
        "time        2m14s from 2026-01-02T03:04:05Z\n"
    )


def test_json_is_the_connection_with_cause_and_cure(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(REFUSED)
    told = json.loads(meshnet("explain", "k802", "-o", "json").output)
    assert told.pop("kind") == "Explanation"
    assert told.pop("apiVersion") == "meshnet.dev/v1"
    assert told.pop("cause") == ADVICE[Reason.BREAKER_OPEN].cause
    assert told.pop("cure").startswith("meshnet endpoints pay:9000 shows")
    assert told.pop("others") == []
    assert told.pop("tcp") is None
    assert told.pop("route") is None
    assert told.pop("rule") is None
    assert told == json.loads(msgspec.json.encode(REFUSED))
    line = meshnet("explain", "k802", "-o", "jsonl").output
    assert line.count("\n") == 1
    assert msgspec.json.decode(line, type=Connection) == REFUSED


def test_others_with_the_same_id_are_listed_below_it(meshnet: Meshnet, sidecar: Sidecar) -> None:
    # A peer has given two of its connections the id of one of ours; meanwhile ours has moved bytes.
    shadow = msgspec.structs.replace(INBOUND, id="k802")
    again = msgspec.structs.replace(REFUSED, direction=INBOUND.direction)
    moved = msgspec.structs.replace(REFUSED, bytes_sent=7)
    sidecar.will_answer(REFUSED)
    sidecar.connections = listing(shadow, moved, OPEN, again)
    ours, _, others = meshnet("explain", "k802").output.partition("\n\nThis id was given to others as well; ")
    assert ours.startswith("k802  out  web -> pay:9000  refused  breaker.open\n")
    assert others == (
        "a client's sidecar chooses what it gives:\n"
        "ID    DIR  CLIENT  SERVICE       ENDPOINT        TLS   POLICY                  AGE  TX    RX   STATE\n"
        "k802  in   web     metrics:9090  127.0.0.1:9090  mtls  default/web-to-metrics  12s  4.1K  999  half-in\n"
        "k802  in   web     pay:9000      -               -     -                       2s   0     0    refused\n"
        "        breaker.open  both endpoints of pay:9000 are ejected; next probe in 24s  meshnet explain k802\n"
    )
    told = json.loads(meshnet("explain", "k802", "-o", "json").output)
    assert told["others"] == json.loads(msgspec.json.encode([shadow, again]))


def test_what_lasted_less_than_a_second_is_told_in_milliseconds(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(msgspec.structs.replace(REFUSED, duration_ms=42))
    assert "\ntime        42ms from " in meshnet("explain", "k802").output


def test_an_unknown_id_fails_with_a_hint_even_if_the_sidecar_has_none(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(Refused(error="no connection 'nope'"))
    result = meshnet("explain", "nope")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: no connection 'nope'\n"
        "why: it never was here, or it ended so long ago that it is forgotten (admin.memory_mib)\n"
        "fix: meshnet conns --all -o name lists every connection the sidecar remembers\n"
    )


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_a_cause_and_a_cure(meshnet: Meshnet, sidecar: Sidecar, reason: Reason) -> None:
    sidecar.will_answer(msgspec.structs.replace(REFUSED, reason=ReasonView(code=reason)))
    told = json.loads(meshnet("explain", "k802", "-o", "json").output)
    assert told["cause"]
    assert told["cure"]
    assert not {"SERVICE", "ID"} & set(told["cure"].split())


@pytest.mark.parametrize("reason", Reason)
def test_a_reason_code_is_explained_without_a_connection_or_a_sidecar(meshnet: Meshnet, reason: Reason) -> None:
    said = meshnet("explain", reason).stdout
    assert ADVICE[reason].cause in said
    assert ADVICE[reason].cure in said


def test_a_service_name_that_looks_like_a_placeholder_is_kept(meshnet: Meshnet, sidecar: Sidecar) -> None:
    destination = msgspec.structs.replace(REFUSED.destination, service="ID:1")
    sidecar.will_answer(msgspec.structs.replace(REFUSED, destination=destination))
    assert "what to do  meshnet endpoints ID:1 shows" in meshnet("explain", "k802").output


def test_no_advice_is_given_for_a_reason_that_does_not_exist() -> None:
    assert set(ADVICE) == set(Reason)
