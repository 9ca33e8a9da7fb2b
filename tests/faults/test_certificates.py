"""Certificates that are no good, and clocks that are wrong: neither side speaks, and both say why."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from meshnet.control.authority import Authority, Issued, save_issued
from tests.faults.causes import HOUR, SECRET, off_by, wrong_clock
from tests.faults.conftest import once
from tests.faults.strange import another_host, strange
from tests.proxy.programs import Records, accept, converse, listen, nobody_came, reason
from tests.traffic.calls import is_reset
from tests.traffic.conftest import Hosts, Name, traffic
from tests.world import Sidecar, wait_for

pytestmark = pytest.mark.netns

ONE_ATTEMPT = {"attempts": 1}


def now(**offset: float) -> datetime:
    return datetime.now(UTC) + timedelta(**offset)


def issue(hosts: Hosts, fault: str, who: str) -> Issued:
    """A certificate for `who` with a fault."""
    authority, identity = hosts.mesh.authority, hosts.mesh.identity(who)
    match fault:
        case "expired":
            return authority.issue(identity, now=now(minutes=-2), ttl=timedelta(seconds=1))
        case "not yet valid":
            return authority.issue(identity, now=now(hours=1))
        case "of another trust domain":
            domain = "elsewhere.example"
            stranger = Authority.create(domain, now=now()).issue(f"spiffe://{domain}/ns/default/sa/{who}", now=now())
            return Issued(stranger.certificate, stranger.key, stranger.bundle + authority.bundle)
        case "of another id":
            return authority.issue(hosts.mesh.identity("somebody-else"), now=now())
    raise AssertionError(fault)


def call(hosts: Hosts, name: Name, caller: Sidecar, callee: Sidecar, heard: bool) -> tuple[str, ...]:
    """Why both say that one call was refused, the caller first; whether its peer has `heard` of it at all.

    The application, which listens, never does.
    """
    out, into = Records(caller), Records(callee)
    with listen(callee.host, name.port) as server:
        assert is_reset(caller.host, name)
        assert nobody_came(server)
    if heard:
        wait_for(into.now, what="what is recorded at the other side")
    here = {reason(record) for record in into.now()}  # of tunnels, of which more than one may have been tried
    return reason(out.one()), *sorted(here)


def put(hosts: Hosts, name: Name, callee: Sidecar, caller: Sidecar) -> None:
    """The mesh has a service there, and the caller knows."""
    hosts.write(hosts.service(name, [callee.host]), traffic(name, connect=ONE_ATTEMPT))
    wait_for(lambda: caller.endpoints(name.name).items, what=f"{name.name} at {caller.host.name}")


NOT_TAKEN = "tls.no_identity by proxy in connect", "tls.no_identity by proxy in accept"
"""What one says whose certificate the other does not take: as the caller, and as the one that is called."""


@pytest.mark.parametrize(
    ("relay", "fault", "code"),
    [
        ("auto", "expired", "tls.expired"),
        ("auto", "not yet valid", "tls.not_yet_valid"),
        ("python", "not yet valid", "tls.not_yet_valid"),
        ("auto", "of another trust domain", "tls.peer_identity"),
    ],
)
def test_a_certificate_that_is(hosts: Hosts, name: Name, fault: str, code: str) -> None:
    web, host, back = hosts.sidecar(hosts.web), another_host(hosts), hosts.new_name()
    as_caller, as_called = NOT_TAKEN
    with strange(hosts, host, issued=issue(hosts, fault, host.name)) as sidecar:
        put(hosts, name, sidecar, web)
        assert call(hosts, name, web, sidecar, heard=True) == (f"{code} by proxy in tls", as_called)
        put(hosts, back, web, sidecar)
        if fault in ("expired", "not yet valid"):  # it knows, and does not even dial
            assert call(hosts, back, sidecar, web, heard=False) == ("tls.no_identity by proxy in tls",)
        else:
            assert call(hosts, back, sidecar, web, heard=True) == (as_caller, f"{code} by proxy in accept")


@once
def test_a_certificate_of_another_id_is_not_spoken_to_and_may_call_as_who_it_is(hosts: Hosts, name: Name) -> None:
    web, host, back = hosts.sidecar(hosts.web), another_host(hosts), hosts.new_name()
    with strange(hosts, host, issued=issue(hosts, "of another id", host.name)) as sidecar:
        put(hosts, name, sidecar, web)
        assert call(hosts, name, web, sidecar, heard=False) == ("tls.peer_identity by proxy in tls",)
        put(hosts, back, web, sidecar)
        into = Records(web)
        with listen(hosts.web, back.port) as server:
            converse(host.connect(back.address, back.port), accept(server), SECRET)
        assert into.one().source.identity == hosts.mesh.identity("somebody-else")


@pytest.fixture(scope="session")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wrong_clock(tmp_path_factory.mktemp("clock"))


@once
def test_a_host_whose_clock_is_an_hour_behind_takes_nobody_and_both_sides_speak_of_clocks(
    hosts: Hosts, name: Name, clock: Path
) -> None:
    web, back = hosts.sidecar(hosts.web), hosts.new_name()
    as_caller, _ = NOT_TAKEN
    with strange(hosts, another_host(hosts), environment=off_by(clock, -HOUR)) as sidecar:
        put(hosts, name, sidecar, web)
        assert call(hosts, name, web, sidecar, heard=True) == (as_caller, "tls.not_yet_valid by proxy in accept")
        put(hosts, back, web, sidecar)
        assert call(hosts, back, sidecar, web, heard=False) == ("tls.no_identity by proxy in tls",)
        messages = [record.reason.message for record in sidecar.connections() if record.reason is not None]
        assert all("is that right (timedatectl)?" in each or "this host's clock says" in each for each in messages)


@once
def test_a_host_whose_clock_is_behind_blames_no_endpoint_for_it_and_its_status_says_so(
    hosts: Hosts, name: Name, clock: Path
) -> None:
    web = hosts.sidecar(hosts.web)
    with strange(hosts, another_host(hosts), environment=off_by(clock, -HOUR)) as sidecar:
        put(hosts, name, web, sidecar)
        out = Records(sidecar)
        with listen(hosts.web, name.port) as server:
            assert all(is_reset(sidecar.host, name) for _ in range(7))
            assert nobody_came(server)
        assert {reason(record) for record in out.ended(7)} == {"tls.no_identity by proxy in tls"}
        (view,) = sidecar.endpoints(name.name).items
        assert (view.failures, view.breaker, view.state) == (0, "closed", "healthy")
        said = sidecar.meshnet("status", check=False)
        assert f"NOT VALID before {sidecar.status().certificate.not_before}" in said
        assert "set the clock" in said


@once
def test_who_has_renewed_a_certificate_that_our_clock_does_not_take_yet_is_left_alone_and_keeps_what_is_open(
    hosts: Hosts, name: Name
) -> None:
    """Nor is it ejected: it is our own clock, or its issuer's, that is wrong."""
    web, host = hosts.sidecar(hosts.web), another_host(hosts)
    with strange(hosts, host) as sidecar, listen(host, name.port) as server:
        policy = traffic(name, connect=ONE_ATTEMPT, breaker={"failures": 2, "openTime": "60s"}, onEject="close")
        hosts.write(hosts.service(name, [host]), policy)
        wait_for(lambda: web.endpoints(name.name).items, what="the service")
        with hosts.web.connect(name.address, name.port) as held, accept(server) as answering:
            began = sidecar.status().certificate.not_before
            save_issued(issue(hosts, "not yet valid", host.name), sidecar.config.parent)
            wait_for(lambda: sidecar.status().certificate.not_before > began, what="the other certificate")
            out = Records(web)
            assert all(is_reset(hosts.web, name) for _ in range(3))
            reasons = sorted(reason(record) for record in out.ended(3))
            assert reasons == ["breaker.open by proxy in queue", *["tls.not_yet_valid by proxy in tls"] * 2]
            (view,) = web.endpoints(name.name).items
            assert (view.state, view.ejected_for_seconds) == ("open", 0)
            held.sendall(b"still here")
            assert answering.recv(100) == b"still here"


@once
def test_a_host_whose_clock_is_an_hour_ahead_is_served_and_serves(hosts: Hosts, name: Name, clock: Path) -> None:
    web, other = hosts.sidecar(hosts.web), hosts.new_name()
    with strange(hosts, another_host(hosts), environment=off_by(clock, HOUR)) as sidecar:
        for service, caller, callee in ((name, web, sidecar), (other, sidecar, web)):
            put(hosts, service, callee, caller)
            out, into = Records(caller), Records(callee)
            with listen(callee.host, service.port) as server:
                for _ in range(2):
                    converse(caller.host.connect(service.address, service.port), accept(server), SECRET)
            for record in (*out.ended(2), *into.ended(2)):
                assert reason(record) == "ok by client in data"
