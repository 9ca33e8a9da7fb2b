"""Rules and a sidecar that were made by the same settings fit; else what does not fit is told."""

from typing import Any, Literal

import msgspec
import pytest

from meshnet.model.admin import CertificateStatus, ConfigStatus, RelayStatus, Status
from meshnet.model.settings import AdminSection, CaptureSection, ProxySection, Settings
from meshnet_init.plan import Host, make_plan
from meshnet_init.rule import Rule, drain_set
from meshnet_init.sidecar import captured_from_anywhere, misfits

GID = CaptureSection().gid


def rules(settings: Settings | None = None, *, ipv6: bool = True, gids: range = range(2**32 - 1)) -> tuple[Rule, ...]:
    return make_plan(settings or Settings(), Host(ipv6=ipv6, gids=(gids,))).rules


def sidecar(settings: Settings | None = None, *, mark: int | None = 0x1000, gid: int | None = GID) -> Status:
    settings = settings or Settings()
    proxy, admin = settings.proxy, settings.admin
    return Status(
        node="app",
        version="1",
        pid=42,
        uptime_seconds=1.0,
        ready=True,
        not_ready_because=(),
        draining=False,
        listeners={
            "outbound": f"127.0.0.1:{proxy.outbound_port}, [::1]:{proxy.outbound_port}",
            "inbound": f"0.0.0.0:{proxy.inbound_port}, [::]:{proxy.inbound_port}",
            "tunnel": f"0.0.0.0:{proxy.tunnel_port}",
            "health": f"0.0.0.0:{admin.health_port}",
            "admin": admin.socket,
        },
        open_connections=0,
        opened_total=0,
        failed_total=0,
        certificate=CertificateStatus(),
        config=ConfigStatus(version=1, directory="/", services=0, policies=0, age_seconds=0.0),
        relay=RelayStatus(in_use=("python",)),
        mark=mark,
        gid=gid,
        readiness_port=settings.capture.readiness_port,
    )


def with_proxy(**values: int) -> Settings:
    return Settings(proxy=ProxySection(**values))


def test_of_the_same_settings_they_fit() -> None:
    assert misfits(rules(), None, sidecar()) == ()
    assert misfits(rules(ipv6=False), None, sidecar()) == ()
    other = with_proxy(outbound_port=1, inbound_port=2, tunnel_port=3, mark=4)
    assert misfits(rules(other), None, sidecar(other, mark=4)) == ()


def test_no_rules_and_a_drain_set_fit_any_sidecar() -> None:
    assert misfits((), None, sidecar()) == ()
    assert misfits(drain_set([1, 2]).rules, None, sidecar(mark=0, gid=0)) == ()


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (
            {"outbound_port": 16101},
            "the rules turn outbound connections to port 16101, the sidecar takes them at 127.0.0.1:15101, [::1]:15101",
        ),
        (
            {"inbound_port": 16106},
            "the rules turn inbound connections to port 16106, the sidecar takes them at 0.0.0.0:15106, [::]:15106",
        ),
        (
            {"tunnel_port": 16108},
            "the rules capture what comes in for port 15108, which is the sidecar's own (tunnel)",
        ),
    ],
)
def test_a_port_that_differs_is_named(setting: dict[str, int], told: str) -> None:
    assert misfits(rules(with_proxy(**setting)), None, sidecar()) == (told,)


def test_a_health_port_that_would_be_captured_is_named() -> None:
    (told,) = misfits(rules(Settings(admin=AdminSection(health_port=16120))), None, sidecar())
    assert told == "the rules capture what comes in for port 15120, which is the sidecar's own (health)"


def test_an_own_port_that_no_rule_captures_needs_no_exception() -> None:
    few = Settings(proxy=ProxySection(tunnel_port=16108), capture=CaptureSection(inbound_ports=("80",)))
    assert misfits(rules(few), None, sidecar()) == ()


def asked_at(port: int, **capture: Any) -> Settings:
    return Settings(capture=CaptureSection(readiness_port=port, **capture))


@pytest.mark.parametrize("mode", ["redirect", "tproxy"])
def test_the_port_where_readiness_is_asked_for_has_to_be_the_one_where_it_is_answered(mode: str) -> None:
    planned = rules(asked_at(15124, inbound_mode=mode))
    running = msgspec.structs.replace(sidecar(asked_at(15124)), inbound_mode=mode)
    assert misfits(planned, None, running) == ()
    none, other = (msgspec.structs.replace(running, readiness_port=port) for port in (0, 15125))
    told = "by the rules readiness is asked for at port 15124, the sidecar answers at "
    assert misfits(planned, None, none) == (f"{told}no port",)
    assert misfits(planned, None, other) == (f"{told}15125",)
    assert misfits(planned, None, msgspec.structs.replace(running, readiness_port=None)) == ()


def test_a_sidecar_that_is_asked_for_readiness_by_nobody_is_told() -> None:
    assert misfits(rules(), None, sidecar(asked_at(15124))) == ()  # captured like any port
    (told,) = misfits(rules(asked_at(0, inbound_ports=("80",))), None, sidecar(asked_at(15124)))
    assert told == "the sidecar answers for readiness at port 15124, from where the rules bring nobody"


def test_another_mark_is_told_with_what_follows() -> None:
    (told,) = misfits(rules(with_proxy(mark=0x2000)), None, sidecar(gid=0))
    assert told == (
        "the rules let connections with mark 0x2000 pass, but the sidecar marks its own connections 0x1000:"
        " it captures them itself, again and again, until it runs out of descriptors"
    )


def test_another_mark_that_the_group_makes_up_for_is_told_too() -> None:
    (told,) = misfits(rules(with_proxy(mark=0x2000)), None, sidecar())
    assert told.endswith(f"only its group {GID} keeps them from being captured")


def test_a_sidecar_that_may_not_mark_needs_its_group() -> None:
    assert misfits(rules(), None, sidecar(mark=0)) == ()
    (told,) = misfits(rules(), None, sidecar(mark=0, gid=0))
    assert "may not mark its own connections" in told
    (told,) = misfits(rules(gids=range(1)), None, sidecar(mark=0))  # a user namespace that does not have the group
    assert "runs out of descriptors" in told


def test_of_a_sidecar_that_does_not_say_its_mark_nothing_is_claimed() -> None:
    old = msgspec.json.decode(msgspec.json.encode(sidecar(mark=None, gid=None)), type=Status)
    assert misfits(rules(with_proxy(mark=0x2000)), None, old) == ()


@pytest.mark.parametrize(
    ("capture", "captured"),
    [
        (CaptureSection(), False),
        (CaptureSection(exclude_inbound_ports=()), True),
        (CaptureSection(exclude_inbound_ports=(), inbound_ports=("80",)), False),
        (CaptureSection(exclude_inbound_ports=(), inbound_cidrs=("10.0.0.0/8",)), True),
        (CaptureSection(exclude_inbound_ports=(), inbound_interfaces=("eth0",)), True),
        (CaptureSection(exclude_inbound_ports=(), exclude_inbound_cidrs=("192.0.2.0/24",)), True),
        (CaptureSection(exclude_inbound_ports=(), exclude_interfaces=("eth1",)), True),
        (CaptureSection(exclude_inbound_ports=(), exclude_inbound_cidrs=("0.0.0.0/0", "::/0")), False),
        (CaptureSection(readiness_port=22), True),
        (CaptureSection(readiness_port=22, inbound_ports=(), ipv6="off"), True),
        (CaptureSection(reroute_interfaces=("br0",)), False),
    ],
)
@pytest.mark.parametrize("mode", ["redirect", "tproxy"])
def test_a_port_is_captured_if_anybody_s_connection_to_it_is(
    capture: CaptureSection, captured: bool, mode: Literal["redirect", "tproxy"]
) -> None:
    capture = msgspec.structs.replace(capture, inbound_mode=mode, drop_invalid=mode == "redirect")
    assert captured_from_anywhere(rules(Settings(capture=capture)), 22) == captured
