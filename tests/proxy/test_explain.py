"""The steps of a connection, told from its record."""

import pytest

from meshnet.errors import ConnectionFailed, EndedBy, Phase, Reason
from meshnet.model.address import Address
from meshnet.model.connection import Attempt, Direction, Security
from meshnet.proxy.explain import trace
from meshnet.proxy.record import Record
from meshnet.relay import Outcome
from tests.proxy.test_record import registry

SOURCE, SERVICE = Address("10.0.0.1", 1234), Address("10.96.0.10", 80)
WEB, API = "spiffe://mesh.example/ns/default/sa/web", "spiffe://mesh.example/ns/default/sa/api"


def outbound() -> Record:
    record = registry().life(Direction.OUTBOUND, SOURCE, None, "id")
    record.original = SERVICE
    return record


def test_a_connection_through_the_mesh_is_told_from_capture_to_end() -> None:
    with outbound() as record:
        record.service, record.queued = "api:80", 0.25
        record.attempts = [
            Attempt(endpoint="10.0.0.2:80", result="connect.refused", ms=0.5, detail="nobody listens"),
            Attempt(endpoint="10.0.0.3:80", result="ok", ms=1.25),
        ]
        record.security, record.source_identity, record.destination_identity = Security.MTLS, WEB, API
        record.tls_version, record.cipher, record.handshake_ms = "TLSv1.3", "TLS_AES_256_GCM_SHA384", 3.21
        record.connected, record.phase, record.relay = record.opened + 1, Phase.DATA, "python"
        record.tally.sent, record.tally.received = 5, 7
        record.finish(Outcome(Reason.OK, EndedBy.SERVER))
    assert trace(record.view()) == (
        "capture: outbound from 10.0.0.1:1234 to 10.96.0.10:80",
        "service: api:80",
        "limits: waited 250 ms for a free connection",
        "attempt 1: 10.0.0.2:80 connect.refused after 0.5 ms: nobody listens",
        "attempt 2: 10.0.0.3:80 ok after 1.25 ms",
        f"mtls: {WEB} to {API}, TLSv1.3 TLS_AES_256_GCM_SHA384, full handshake in 3.2 ms",
        "data: 5 bytes sent, 7 received, moved by python",
        "end: ok by server in phase data",
    )


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        (Reason.CONNECT_REFUSED, ", and failed with ECONNREFUSED"),
        (Reason.CONNECT_TIMEOUT, ", and failed with EHOSTUNREACH"),
        (Reason.PEER_RST, " until it gave up"),
    ],
)
def test_of_a_held_connect_it_is_told_how_it_failed(reason: Reason, told: str) -> None:
    with outbound() as record:
        record.held = True
        assert trace(record.view())[-2] == "connect: the application's own was held, and still is"
        raise ConnectionFailed(reason)
    assert trace(record.view())[-2] == f"connect: the application's own was held{told}"


def test_a_tunnel_that_stood_already_and_a_resumed_handshake_are_told_apart() -> None:
    record = outbound()
    record.security = Security.MTLS
    assert trace(record.view())[-2].endswith("on a tunnel that stood already")
    record.handshake_ms, record.resumed = 1.0, True
    assert trace(record.view())[-2].endswith("resumed handshake in 1.0 ms")


def test_an_inbound_call_is_told_with_who_called_and_what_policy_said() -> None:
    with registry().life(Direction.INBOUND, SOURCE, None) as record:
        record.original, record.service, record.phase = Address("10.0.0.2", 80), "api:80", Phase.AUTHZ
        raise ConnectionFailed(Reason.AUTHZ_DENIED, "not you", ended_by=EndedBy.POLICY, policy="nobody")
    assert trace(record.view()) == (
        "capture: inbound from 10.0.0.1:1234 to 10.0.0.2:80",
        "identity: a client without identity, in plain text",
        "service: api:80",
        "policy: nobody",
        "end: authz.denied by policy in phase authz: not you",
    )


def test_a_pass_through_and_a_connection_that_is_still_open_are_told_as_such() -> None:
    record = outbound()
    record.endpoint, record.phase = "10.96.0.10:80", Phase.DATA
    assert trace(record.view()) == (
        "capture: outbound from 10.0.0.1:1234 to 10.96.0.10:80",
        "service: none has this address; passed through",
        "now: open",
    )


def test_the_canary_of_rules_verify_is_told_as_one() -> None:
    with outbound() as record:
        record.original = Address("192.0.2.2", 15122)
        record.end(Reason.OK, EndedBy.PROXY, "capture canary")
    assert trace(record.view()) == (
        "capture: outbound from 10.0.0.1:1234 to 192.0.2.2:15122",
        "service: none; a canary of `meshnet rules verify` or `up`, answered here and carried nowhere",
        "end: ok by proxy in phase accept: capture canary",
    )


def test_a_connection_that_was_never_redirected_has_no_destination() -> None:
    with registry().life(Direction.OUTBOUND, SOURCE, None) as record:
        raise ConnectionFailed(Reason.NOT_REDIRECTED)
    assert trace(record.view())[0].endswith("to an unknown destination")
