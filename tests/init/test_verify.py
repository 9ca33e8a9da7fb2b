"""Verification: what differs is told in words, and a canary only comes back through the rules."""

import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import msgspec
import pytest

from meshnet.errors import ConnectionFailed
from meshnet.model.admin import CertificateStatus, ConfigStatus, RelayStatus, Status
from meshnet.model.canary import CANARY_GREETING
from meshnet.model.settings import ProxySection, Settings
from meshnet.net.original import original_destination
from meshnet_init.apply import installed_rules
from meshnet_init.rollback import put_back
from meshnet_init.rule import drain_set
from meshnet_init.verify import Verification, verify
from tests.init.kernel import INBOUND, OUTBOUND, Lab, backend_named, capture, listening
from tests.init.test_missing import in_child
from tests.seccomp import Refusal, refuse
from tests.world import Host, World, wait_for

pytestmark = pytest.mark.netns


RUNS = Status(
    node="app",
    version="1",
    pid=42,
    uptime_seconds=1.0,
    ready=True,
    not_ready_because=(),
    draining=False,
    listeners={"outbound": "127.0.0.1:15101, [::1]:15101", "inbound": "0.0.0.0:15106, [::]:15106"},
    open_connections=0,
    opened_total=0,
    failed_total=0,
    certificate=CertificateStatus(),
    config=ConfigStatus(version=1, directory="/", services=0, policies=0, age_seconds=0.0),
    relay=RelayStatus(in_use=("python",)),
    mark=0x1000,
    gid=15137,
)
RUNS_ELSEWHERE = msgspec.structs.replace(RUNS, listeners={**RUNS.listeners, "outbound": "127.0.0.1:16101, [::1]:16101"})


def verified(host: Host, settings: Settings, sidecar: Status | None = None) -> Verification:
    with host.entered():
        return verify(settings, sidecar)


def statuses(result: Verification) -> list[str]:
    return [canary.status for canary in result.canaries]


def test_rules_as_planned_bring_both_canaries_back(lab: Lab) -> None:
    lab.install()

    result = verified(lab.app, capture())

    assert result.ok
    assert result.backend == lab.backend.name
    assert result.differences == ()
    assert statuses(result) == ["captured", "captured"]


def test_a_running_proxy_answers_for_the_canary(lab: Lab) -> None:
    lab.install()

    with answering(lab.app, CANARY_GREETING):
        result = verified(lab.app, capture())

    assert result.ok
    assert {canary.detail for canary in result.canaries} == {"the proxy answered"}


def test_somebody_else_on_the_proxys_port_is_no_proof(lab: Lab) -> None:
    lab.install()

    with answering(lab.app, b"220 mail ready "):
        result = verified(lab.app, capture())

    assert not result.ok
    assert statuses(result) == ["not captured", "not captured"]


def test_a_sidecar_that_runs_elsewhere_is_not_stood_in_for(lab: Lab) -> None:
    lab.install()

    result = verified(lab.app, capture(), RUNS_ELSEWHERE)

    assert not result.ok
    assert result.sidecar == "differs"
    assert "to port 15101, the sidecar takes them at 127.0.0.1:16101" in result.misfits[0]
    assert statuses(result) == ["not captured", "not captured"]
    assert {canary.detail for canary in result.canaries} == {"nobody listens on port 15101, where the rules lead"}
    assert "sudo meshnet down && sudo meshnet up" in result.fix


def test_a_sidecar_that_fits_answers_for_itself(lab: Lab) -> None:
    lab.install()

    with answering(lab.app, CANARY_GREETING):
        result = verified(lab.app, capture(), RUNS)

    assert result.ok
    assert (result.sidecar, result.misfits, result.fix) == ("fits", (), "")
    assert {canary.detail for canary in result.canaries} == {"the proxy answered"}


def test_settings_that_changed_under_rules_and_sidecar_are_told_from_capture(lab: Lab) -> None:
    lab.install()
    changed = msgspec.structs.replace(capture(), proxy=ProxySection(outbound_port=16101))

    with answering(lab.app, CANARY_GREETING):
        result = verified(lab.app, changed, RUNS)

    assert not result.ok
    assert any("16101" in line for line in result.differences)
    assert result.sidecar == "fits"
    assert statuses(result) == ["captured", "captured"]
    assert "sudo meshnet down && sudo meshnet up" in result.fix


def test_nothing_installed_is_told_and_no_canary_sent(lab: Lab) -> None:
    result = verified(lab.app, capture())

    assert result == Verification(
        ok=False,
        backend="",
        differences=("no rules are installed",),
        fix="sudo meshnet up, or without a sidecar: sudo meshnet init",
    )


def test_rules_lost_behind_our_back_lose_the_canary(lab: Lab) -> None:
    lab.install()
    lab.flush("MESHNET_OUT")

    result = verified(lab.app, capture())

    assert not result.ok
    assert any("missing in MESHNET_OUT" in line for line in result.differences)
    assert statuses(result) == ["not captured", "not captured"]


def test_settings_that_changed_since_are_told(lab: Lab) -> None:
    lab.install()

    result = verified(lab.app, capture(exclude_outbound_ports=["25"]))

    assert not result.ok
    assert result.differences
    assert all("tcp dport 25" in line for line in result.differences)
    assert statuses(result) == ["captured", "captured"]


def test_a_drain_set_is_not_capture(lab: Lab) -> None:
    with lab.app.entered():
        lab.backend.apply(drain_set([OUTBOUND]))

    assert not verified(lab.app, capture()).ok


def test_older_rules_of_another_backend_are_told(world: World, lab: Lab) -> None:
    from meshnet_init.choose import every_backend
    from meshnet_init.host import host_facts
    from meshnet_init.plan import make_plan

    with lab.app.entered():
        for backend in every_backend():
            backend.apply(make_plan(capture(), host_facts()))

    result = verified(lab.app, capture())

    assert not result.ok
    assert any("beside" in line for line in result.differences)


def test_without_a_default_route_a_neighbours_address_does(lab: Lab) -> None:
    lab.app.configure("route del default", "route del ::/0")
    lab.install()

    result = verified(lab.app, capture())

    assert statuses(result) == ["captured", "captured"]
    assert result.canaries[0].destination == "10.77.0.1:15122"


def test_without_any_route_it_is_said_so(lab: Lab) -> None:
    lab.app.configure("link set eth0 down")
    lab.install()

    result = verified(lab.app, capture())

    assert result.ok
    assert statuses(result) == ["no route", "no route"]


def test_a_proxy_and_no_route_is_no_route(lab: Lab) -> None:
    lab.app.configure("route del default", "route del ::/0")
    lab.install()

    with answering(lab.app, CANARY_GREETING):
        assert statuses(verified(lab.app, capture())) == ["no route", "no route"]


def test_a_family_left_alone_is_not_tried(lab: Lab) -> None:
    lab.install(ipv6="off")

    result = verified(lab.app, capture(ipv6="off"))

    assert result.ok
    assert statuses(result) == ["captured", "not in the plan"]


def test_the_canary_goes_where_the_plan_captures(lab: Lab) -> None:
    narrow = {"outbound_cidrs": ["10.77.0.0/24"], "outbound_ports": ["5432"]}
    lab.install(**narrow)

    result = verified(lab.app, capture(**narrow))

    assert result.ok
    assert statuses(result) == ["captured", "not in the plan"]
    assert result.canaries[0].destination == "10.77.0.1:5432"


def test_as_the_proxys_group_nothing_can_be_proved(lab: Lab) -> None:
    own = {"gid": os.getegid()}
    lab.install(**own)

    assert statuses(verified(lab.app, capture(**own))) == ["not tried", "not tried"]


@pytest.mark.parametrize("before", [None, {"exclude_inbound_ports": ["22"], "outbound_cidrs": ["10.0.0.0/8"]}])
def test_what_was_in_force_can_be_put_back(lab: Lab, before: dict[str, object] | None) -> None:
    if before is not None:
        lab.install(**before)
    with lab.app.entered():
        installed = installed_rules()
        rules = [[counted.rule for counted in each.rules] for each in installed]
    lab.install(outbound_ports=["80"])

    with lab.app.entered():
        put_back(installed, drain=0.0)
        assert [[counted.rule for counted in each.rules] for each in installed_rules()] == rules


@contextmanager
def answering(host: Host, greeting: bytes) -> Iterator[None]:
    """A proxy, as far as a canary sees it: tells every client where it wanted to go."""
    with ExitStack() as stack:
        for family, loopback in (("ipv4", "127.0.0.1"), ("ipv6", "::1")):
            for port, address in ((OUTBOUND, loopback), (INBOUND, "")):
                listener = stack.enter_context(listening(host, family, port, address))
                thread = threading.Thread(target=answer, args=(listener, greeting))
                thread.start()
                stack.callback(thread.join)
                stack.callback(listener.shutdown, socket.SHUT_RDWR)
        yield


def answer(listener: socket.socket, greeting: bytes) -> None:
    listener.settimeout(None)
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        with client:
            try:
                client.sendall(greeting + f"{original_destination(client)}\n".encode())
            except ConnectionFailed:
                pass


def inbound(result: Verification) -> list[str]:
    return [canary.status for canary in result.inbound]


def interfaces(host: Host) -> set[str]:
    return {line.split(": ")[1].partition("@")[0] for line in host.run("ip", "-o", "link").stdout.splitlines()}


def test_a_visitor_proves_that_what_comes_in_is_captured_and_leaves_nothing_behind(lab: Lab) -> None:
    lab.install()
    before = interfaces(lab.app)

    result = verified(lab.app, capture())

    assert inbound(result) == ["captured", "captured"]
    assert [canary.destination for canary in result.inbound] == ["192.0.2.9:15122", "[2001:db8::9]:15122"]
    assert interfaces(lab.app) == before


def test_rules_for_what_comes_in_that_are_lost_lose_the_visitor(lab: Lab) -> None:
    lab.install()
    lab.flush("MESHNET_IN")

    result = verified(lab.app, capture())

    assert not result.ok
    assert statuses(result) == ["captured", "captured"]
    assert inbound(result) == ["not captured", "not captured"]


@pytest.fixture
def by_nft(world: World) -> Lab:
    """For what has nothing to do with the backend."""
    return Lab(world, backend_named("nft"))


def test_somebody_elses_rules_ahead_of_ours_take_the_visitor_away(by_nft: Lab) -> None:
    """istio#56414: rules placed after others."""
    by_nft.install()
    ahead = "table inet ahead { chain c { type nat hook prerouting priority -150; tcp dport 15122 redirect to :9; }; }"
    by_nft.app.run("nft", "-f", "-", stdin=ahead)

    result = verified(by_nft.app, capture())

    assert result.differences == ()
    assert not result.ok
    assert inbound(result) == ["not captured", "not captured"]


@pytest.mark.parametrize("verdict", ["drop", "reject with tcp reset"])
def test_a_firewall_that_refuses_a_new_interface_proves_nothing_and_fails_nothing(by_nft: Lab, verdict: str) -> None:
    by_nft.install()
    match = f'iifname "mnproof*" tcp flags syn {verdict}'
    wall = f"table inet wall {{ chain c {{ type filter hook input priority 0; {match}; }}; }}"
    by_nft.app.run("nft", "-f", "-", stdin=wall)

    result = verified(by_nft.app, capture())

    assert result.ok
    assert inbound(result) == ["not tried", "not tried"]
    assert "firewall" in result.inbound[0].detail


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"inbound_ports": []}, ["not in the plan", "not in the plan"]),
        ({"inbound_ports": ["7000-7001"], "exclude_inbound_ports": ["7000"]}, ["captured", "captured"]),
        ({"exclude_inbound_cidrs": ["192.0.2.0/24"]}, ["not in the plan", "captured"]),
        ({"ipv6": "off"}, ["captured", "not in the plan"]),
    ],
)
def test_the_visitor_calls_where_the_plan_captures(
    by_nft: Lab, settings: dict[str, object], expected: list[str]
) -> None:
    by_nft.install(**settings)

    result = verified(by_nft.app, capture(**settings))

    assert result.ok
    assert inbound(result) == expected
    if settings.get("inbound_ports"):
        assert result.inbound[0].destination == "192.0.2.9:7001"


LIMITED = ("setpriv", "--bounding-set=-all,+net_admin", "--inh-caps=-all", "--no-new-privs", "--")


def test_a_visitor_takes_no_more_than_net_admin_where_anybody_may_make_a_user_namespace(by_nft: Lab) -> None:
    """The keeper's unit and a pod's init container have no more."""
    by_nft.install()
    done = by_nft.app.run(*LIMITED, "meshnet", "rules", "verify", MESHNET_CAPTURE__EXCLUDE_INBOUND_PORTS="")
    lines = [line.split()[:3] for line in done.stdout.splitlines()]
    assert ["inbound", "ipv4", "captured"] in lines
    assert ["inbound", "ipv6", "captured"] in lines
    assert "mnproof0" not in interfaces(by_nft.app)


def test_a_visitor_waits_for_the_end_of_somebody_elses(by_nft: Lab) -> None:
    """`up` changes rules and proves them, and so does a keeper that hears of it."""
    by_nft.install()
    wall = 'table inet wall { chain c { type filter hook input priority 0; iifname "mnproof*" ip ttl > 0 drop; }; }'
    by_nft.app.run("nft", "-f", "-", stdin=wall)  # so that IPv4 takes each of them seconds
    words, every_port = ("meshnet", "rules", "verify"), {"MESHNET_CAPTURE__EXCLUDE_INBOUND_PORTS": ""}
    by_nft.app.spawn(*words, name="first", **every_port)
    wait_for(lambda: "mnproof0" in interfaces(by_nft.app))
    said = by_nft.app.run(*words, **every_port).stdout
    assert ["inbound", "ipv6", "captured"] in [line.split()[:3] for line in said.splitlines()], said


def test_whoever_may_make_no_namespace_tries_nothing(by_nft: Lab) -> None:
    by_nft.install()
    refused = [Refusal("unshare", {0: flags}, errno.EPERM) for flags in (0x40000000, 0x50000000)]  # CLONE_NEW*
    with by_nft.app.entered():
        said = in_child(lambda: (refuse(*refused), [each.detail for each in verify(capture()).inbound])[1])
    assert said.count("no network namespace for a visitor: Operation not permitted") == 2


def test_a_prover_that_is_killed_leaves_nothing_behind(by_nft: Lab) -> None:
    by_nft.install()
    wall = 'table inet wall { chain c { type filter hook input priority 0; iifname "mnproof*" drop; }; }'
    by_nft.app.run("nft", "-f", "-", stdin=wall)
    prover = by_nft.app.spawn("meshnet", "rules", "verify", name="prover", MESHNET_CAPTURE__EXCLUDE_INBOUND_PORTS="")
    wait_for(lambda: "mnproof0" in interfaces(by_nft.app))
    prover.kill()
    wait_for(lambda: "mnproof0" not in interfaces(by_nft.app))
