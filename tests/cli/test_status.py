import json

import msgspec

from meshnet.model.admin import (
    CertificateStatus,
    ConfigStatus,
    GetStatus,
    RelayStatus,
    Status,
    TruthfulStatus,
    TunnelStatus,
    WorkerStatus,
)
from meshnet.model.capture import CaptureStatus, VisitsView
from tests.cli.conftest import Meshnet
from tests.cli.sidecar import Sidecar

READY = Status(
    node="vm1",
    version="0.1.0",
    pid=2231,
    uptime_seconds=8_040.0,
    ready=True,
    not_ready_because=(),
    draining=False,
    listeners={"outbound": "0.0.0.0:15101", "inbound": "0.0.0.0:15106", "tunnel": "0.0.0.0:15108"},
    open_connections=38,
    opened_total=1204,
    failed_total=3,
    certificate=CertificateStatus(
        identity="spiffe://prod/ns/default/sa/web",
        not_before="2026-01-01T00:00:00Z",
        not_after="2026-01-02T00:00:00Z",
        issuer="meshnet root",
        serial="4f",
        expires_in_seconds=57_600.0,
    ),
    config=ConfigStatus(version=12, directory="/etc/meshnet/mesh.d", services=2, policies=1, age_seconds=5.0),
    relay=RelayStatus(in_use=("python",), not_in_use={"native": "no libssl.so.3 on this machine"}),
    tunnels=(
        TunnelStatus(peer="10.9.0.3:15108 spiffe://prod/ns/default/sa/api", idle=2, leased=1),
        TunnelStatus(peer="10.9.0.4:15108", idle=0, leased=4),
    ),
)
NOT_READY = msgspec.structs.replace(
    READY,
    ready=False,
    not_ready_because=("no certificate", "the redirect rules are not in place"),
    certificate=CertificateStatus(problem="/var/lib/meshnet/identity/cert.pem: no such file"),
    config=ConfigStatus(
        version=0,
        directory="/etc/meshnet/mesh.d",
        services=1,
        policies=2,
        age_seconds=300.0,
        problem="web.yaml:3: no port",
    ),
    relay=RelayStatus(in_use=("python",)),
    tunnels=(),
)


def test_a_ready_sidecar_is_told_in_a_line_a_matter(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(READY)
    result = meshnet("status")
    assert sidecar.asked() == GetStatus()
    assert result.exit_code == 0
    assert result.output == (
        "vm1           ready, meshnet 0.1.0, pid 2231, up 2h14m\n"
        "listeners     outbound 0.0.0.0:15101, inbound 0.0.0.0:15106, tunnel 0.0.0.0:15108\n"
        "connections   38 open, 1204 opened, 3 failed since it started\n"
        "certificate   spiffe://prod/ns/default/sa/web, expires in 16h (2026-01-02T00:00:00Z)\n"
        "config        version 12, 5s old, from /etc/meshnet/mesh.d: 2 services, 1 policy\n"
        "relay         python\n"
        "              not native: no libssl.so.3 on this machine\n"
        "tunnels       10.9.0.3:15108 spiffe://prod/ns/default/sa/api: 2 idle, 1 in use\n"
        "              10.9.0.4:15108: 0 idle, 4 in use\n"
    )


def test_a_sidecar_that_is_not_ready_says_why_and_exits_with_1(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(NOT_READY)
    result = meshnet("status")
    assert result.exit_code == 1
    assert result.output == (
        "vm1           not ready, meshnet 0.1.0, pid 2231, up 2h14m\n"
        "not ready     no certificate\n"
        "not ready     the redirect rules are not in place\n"
        "listeners     outbound 0.0.0.0:15101, inbound 0.0.0.0:15106, tunnel 0.0.0.0:15108\n"
        "connections   38 open, 1204 opened, 3 failed since it started\n"
        "certificate   none: this sidecar speaks to no meshed endpoint\n"
        "problem       /var/lib/meshnet/identity/cert.pem: no such file\n"
        "config        version 0, 5m old, from /etc/meshnet/mesh.d: 1 service, 2 policies\n"
        "problem       web.yaml:3: no port; the last good version stays in force\n"
        "relay         python\n"
        "tunnels       none\n"
    )


def test_each_worker_has_a_line(meshnet: Meshnet, sidecar: Sidecar) -> None:
    one = WorkerStatus(number=1, pid=2232, ready=True, open_connections=38, deaths=0, uptime_seconds=8_039.0)
    two = msgspec.structs.replace(one, number=2, pid=2233, ready=False, open_connections=1, deaths=1)
    three = msgspec.structs.replace(one, number=3, pid=0, ready=False, deaths=5, problem="does not run")
    four = msgspec.structs.replace(one, number=4, pid=2235, ready=False, problem="does not answer")
    sidecar.will_answer(msgspec.structs.replace(READY, workers=(one, two, three, four)))
    assert meshnet("status").output.splitlines()[3:7] == [
        "workers       1: pid 2232, 38 connections open, up 2h13m",
        "              2: pid 2233, 1 connection open, up 2h13m, not ready, 1 death",
        "              3: does not run, 5 deaths",
        "              4: does not answer, pid 2235",
    ]


def test_truthful_connect_has_a_line_and_what_keeps_it_from_working_another(meshnet: Meshnet, sidecar: Sidecar) -> None:
    def told(truthful: TruthfulStatus) -> list[str]:
        sidecar.will_answer(msgspec.structs.replace(READY, truthful=truthful))
        lines = meshnet("status").output.splitlines()
        return lines[3 : next(at for at, line in enumerate(lines) if line.startswith("certificate"))]

    assert told(TruthfulStatus(in_force=True, waiting=2, held=40, unheld=1)) == [
        "connect()     truthful: in force, 40 held, 2 of them now, 1 came past it"
    ]
    assert told(TruthfulStatus(in_force=False, problem="queue 15101: no right"))[1] == (
        "problem       queue 15101: no right; connect() succeeds at once, and what fails then is reset"
    )
    assert told(TruthfulStatus(in_force=True, unheld=9))[1].startswith("problem       no rule holds connections")


def test_a_draining_sidecar_with_an_expired_certificate_says_both(meshnet: Meshnet, sidecar: Sidecar) -> None:
    expired = msgspec.structs.replace(READY.certificate, expires_in_seconds=-5.0)
    sidecar.will_answer(msgspec.structs.replace(READY, ready=False, draining=True, certificate=expired))
    lines = meshnet("status").output.splitlines()
    assert lines[0] == "vm1           draining, meshnet 0.1.0, pid 2231, up 2h14m"
    assert lines[3] == "certificate   spiffe://prod/ns/default/sa/web, EXPIRED 2026-01-02T00:00:00Z"


def test_a_certificate_whose_time_is_still_to_come_is_told_as_one(meshnet: Meshnet, sidecar: Sidecar) -> None:
    early = msgspec.structs.replace(
        READY.certificate, not_before="2026-01-01T00:00:00Z", begins_in_seconds=5.0, problem="it is not valid before"
    )
    sidecar.will_answer(msgspec.structs.replace(READY, certificate=early))
    assert meshnet("status").output.splitlines()[3:5] == [
        "certificate   spiffe://prod/ns/default/sa/web, NOT VALID before 2026-01-01T00:00:00Z",
        "problem       it is not valid before",
    ]


def test_json_is_what_the_sidecar_said_and_the_exit_code_the_same(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(NOT_READY)
    result = meshnet("status", "-o", "json")
    assert json.loads(result.output) == json.loads(msgspec.json.encode(NOT_READY))
    assert result.exit_code == 1
    assert msgspec.json.decode(meshnet("status", "-o", "jsonl").output, type=Status) == NOT_READY
    assert meshnet("status", "-o", "name").output == "vm1\n"


def test_who_asks_for_readiness_through_the_rules_is_told_and_so_is_who_stopped(
    meshnet: Meshnet, sidecar: Sidecar
) -> None:
    visits = [VisitsView(family="ipv4", last="2026-11-30T10:00:00.000Z", every_seconds=5.0)]
    visits.append(msgspec.structs.replace(visits[0], family="ipv6", late=True))
    capture = CaptureStatus(in_place=True, required=True, visits=tuple(visits))
    sidecar.will_answer(msgspec.structs.replace(READY, capture=capture))
    lines = meshnet("status").output.splitlines()
    asked = "readiness was last asked for through the rules at 2026-11-30T10:00:00.000Z"
    assert f"              inbound ipv4: {asked}" in lines
    assert f"problem       inbound ipv6: {asked}, before that every 5 s (meshnet rules verify)" in lines
