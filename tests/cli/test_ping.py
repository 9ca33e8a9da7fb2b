import json

import msgspec
import pytest

from meshnet.errors import EndedBy, Phase, Reason
from meshnet.model.admin import Ping, Refused
from meshnet.model.connection import ReasonView
from meshnet.model.ping import EndpointPing, PingResult
from meshnet_cli.ping import would_fail
from tests.cli.conftest import Meshnet
from tests.cli.sidecar import API, Sidecar

REACHED = EndpointPing(
    endpoint="10.9.0.3:8080",
    tunnel="meshnet",
    weight=1,
    breaker="closed",
    tcp_ms=0.4,
    tls_ms=2.06,
    open_ms=0.6,
    identity=API,
    verdict="allowed",
)
DENIED = msgspec.structs.replace(
    REACHED,
    endpoint="10.9.0.4:8080",
    verdict="denied",
    policy="default/no-web",
    reason=ReasonView(
        code=Reason.AUTHZ_DENIED, message="web may not call port 8080", ended_by=EndedBy.POLICY, phase=Phase.AUTHZ
    ),
)
RESULT = PingResult(
    target="api:8080",
    address="10.96.0.10:8080",
    route="service",
    service="api:8080",
    captured=True,
    items=(REACHED,),
)


def test_each_endpoint_has_a_row_and_why_it_was_not_reached(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(msgspec.structs.replace(RESULT, items=(REACHED, DENIED)))
    result = meshnet("ping", "api:8080")
    assert sidecar.asked() == Ping(target="api:8080", timeout=5.0)
    assert result.exit_code == 1
    assert result.output == (
        "api:8080 (10.96.0.10:8080): captured, service api:8080\n"
        "ENDPOINT       TUNNEL   STATE    TCP    TLS    OPEN   IDENTITY                         VERDICT\n"
        f"10.9.0.3:8080  meshnet  healthy  0.4ms  2.1ms  0.6ms  {API}  allowed\n"
        f"10.9.0.4:8080  meshnet  healthy  0.4ms  2.1ms  0.6ms  {API}  denied by default/no-web\n"
        "        authz.denied  web may not call port 8080\n"
        "1 of 2 reached.\n"
    )


def test_what_is_not_captured_is_told_and_no_failure(meshnet: Meshnet, sidecar: Sidecar) -> None:
    left = msgspec.structs.replace(RESULT, captured=False, capture="capture.exclude_outbound_ports leaves it alone")
    sidecar.will_answer(left)
    result = meshnet("ping", "api:8080", "--columns", "endpoint,tls")
    assert (result.exit_code, result.output) == (
        0,
        "api:8080 (10.96.0.10:8080): NOT captured (capture.exclude_outbound_ports leaves it alone), service api:8080\n"
        "ENDPOINT       TLS\n10.9.0.3:8080  2.1ms\n1 of 1 reached.\n",
    )


def test_a_refusal_needs_no_table(meshnet: Meshnet, sidecar: Sidecar) -> None:
    refused = ReasonView(code=Reason.LOOP, message="10.9.0.2:15101 is this sidecar itself")
    sidecar.will_answer(PingResult(target="10.9.0.2:15101", address="10.9.0.2:15101", route="refused", reason=refused))
    result = meshnet("ping", "10.9.0.2:15101")
    assert (result.exit_code, result.output) == (
        1,
        "10.9.0.2:15101: capture unknown, refused\nloop: 10.9.0.2:15101 is this sidecar itself\n",
    )


def test_several_are_asked_for_one_by_one_and_every_format_has_them(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(RESULT)
    some = ("ping", "api:8080", "--count", "3", "--interval", "10ms", "--timeout", "1s")
    told = json.loads(meshnet(*some, "-o", "json").output)
    assert (told["kind"], len(told["items"])) == ("PingList", 3)
    assert [sidecar.asked() for _ in range(3)] == [Ping(target="api:8080", timeout=1.0)] * 3
    assert told["items"][0] == json.loads(msgspec.json.encode(RESULT))
    assert len(meshnet(*some, "-o", "jsonl").output.splitlines()) == 3
    assert meshnet(*some, "-o", "name").output == "10.9.0.3:8080\n" * 3


def test_a_name_that_is_no_service_is_looked_up(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(Refused(error="no service localhost:80 here", fix="meshnet endpoints lists services"))
    result = meshnet("ping", "localhost:80")
    first, second = sidecar.asked(), sidecar.asked()
    assert isinstance(first, Ping)
    assert isinstance(second, Ping)
    assert first.target == "localhost:80"
    assert second.target in ("127.0.0.1:80", "[::1]:80")
    assert (result.exit_code, "no service localhost:80 here" in result.stderr) == (1, True)


@pytest.mark.parametrize("target", ["api", "localhost:http", "localhost:99999"])
def test_what_is_neither_is_told_by_the_sidecar(meshnet: Meshnet, sidecar: Sidecar, target: str) -> None:
    sidecar.will_answer(Refused(error=f"no service {target} here"))
    result = meshnet("ping", target)
    assert (result.exit_code, result.stderr) == (1, f"error: no service {target} here\n")
    sidecar.asked()
    assert sidecar.requests.empty()


OPEN = msgspec.structs.replace(REACHED, breaker="open")
DRAINING = msgspec.structs.replace(DENIED, weight=0)
FAILING = msgspec.structs.replace(DENIED, check="failing")
PANIC = msgspec.structs.replace(DENIED, check="panic")


@pytest.mark.parametrize(
    ("items", "more", "fails"),
    [
        ((REACHED,), 0, False),
        ((REACHED, DENIED), 0, True),
        ((REACHED, DRAINING), 0, False),  # no connection gets that one
        ((REACHED, OPEN), 0, False),
        ((OPEN,), 0, True),
        ((DRAINING,), 0, True),
        ((OPEN,), 3, False),
        ((REACHED, FAILING), 0, False),
        ((FAILING,), 0, True),
        ((PANIC,), 0, True),  # it is used all the same
        ((msgspec.structs.replace(REACHED, check="panic"),), 0, False),
    ],
)
def test_it_would_fail_where_a_connection_could(items: tuple[EndpointPing, ...], more: int, fails: bool) -> None:
    assert would_fail(msgspec.structs.replace(RESULT, items=items, more=more)) == fails
