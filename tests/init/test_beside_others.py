"""Rules of Docker, kube-proxy and ufw beside ours: untouched, and still doing what they are there for."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from meshnet.model.address import Address
from meshnet.net.sockets import peer_address
from meshnet_init.apply import apply_plan, drift, in_kernel
from meshnet_init.host import host_facts
from meshnet_init.plan import make_plan
from meshnet_init.remove import remove
from meshnet_init.rule import PLACES
from meshnet_init.verify import verify
from tests.init.kernel import (
    APP_PORT,
    COMMANDS,
    FAMILIES,
    INBOUND,
    OTHER_PORT,
    OUTBOUND,
    Lab,
    address_of,
    capture,
    connect,
    listening,
)
from tests.init.others import CLUSTER_IP, CONTAINER, at, docker, kube_proxy, ufw
from tests.init.sides import behind_a_bridge, marked
from tests.init.test_tproxy import transparent
from tests.world import Host

pytestmark = pytest.mark.netns

PutIn = Callable[..., None]
SERVICE = CLUSTER_IP["ipv4"]
LOOPBACK = {"ipv4": "127.0.0.1", "ipv6": "::1"}


@pytest.fixture
def beside(lab: Lab) -> Iterator[PutIn]:
    """Puts in somebody's rules, with none of ours there: with ours they are as they were, and without ours again."""
    before = ""

    def put_in(rules: str, family: str = "ipv4") -> None:
        nonlocal before
        lab.app.run(f"{command(lab, family)}-restore", "--noflush", stdin=rules)
        before = lab.rules_text()

    yield put_in
    assert lines(before) <= lines(lab.rules_text())
    with lab.app.entered():
        remove(0.0)
    assert lab.rules_text() == before


def lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines()}


@pytest.fixture
def container(lab: Lab) -> Host:
    """Behind the bridge docker0 of `app`, and nowhere else."""
    return behind_a_bridge(lab, "docker0", 17)


def test_containers_go_out_and_their_published_ports_are_reached_istio27728(
    lab: Lab, family: str, container: Host, beside: PutIn
) -> None:
    beside(docker(family), family)
    lab.install(exclude_inbound_ports=[str(OTHER_PORT)])
    app, peer = address_of(lab.app, family), address_of(lab.peer, family)

    with ExitStack() as stack:
        inbound = stack.enter_context(listening(lab.app, family, INBOUND))
        outbound = stack.enter_context(listening(lab.app, family, OUTBOUND, LOOPBACK[family]))
        server = stack.enter_context(listening(lab.peer, family, APP_PORT))
        out = connect(container, peer, APP_PORT, server, inbound, outbound)
        assert peer_address(out.server.getpeername()).host == app
        published = stack.enter_context(listening(container, family, 80))
        connect(lab.peer, app, OTHER_PORT, published, inbound, outbound).close()
        lab.install()
        captured = connect(lab.peer, app, OTHER_PORT, inbound, published)
        assert captured.captured_from() == Address(app, OTHER_PORT)
        assert out.works()
        for opened in (captured, out):
            opened.close()


@pytest.mark.parametrize("guarded", [False, True])
def test_containers_are_captured_where_that_is_asked_for_istio44996(
    lab: Lab, family: str, container: Host, beside: PutIn, guarded: bool
) -> None:
    beside(docker(family), family)
    lab.install(reroute_interfaces=["docker0"], strict=guarded)
    peer = address_of(lab.peer, family)

    with listening(lab.app, family, OUTBOUND) as outbound, listening(lab.peer, family, APP_PORT) as server:
        captured = connect(container, peer, APP_PORT, outbound, server)
        assert captured.captured_from() == Address(peer, APP_PORT)
        assert peer_address(captured.server.getpeername()).host == CONTAINER[family]
        captured.close()


def test_a_service_of_kube_proxy_is_captured_as_dialled_and_the_proxy_gets_its_endpoint(
    lab: Lab, family: str, beside: PutIn
) -> None:
    service, peer = CLUSTER_IP[family], address_of(lab.peer, family)
    lab.app.configure(f"route add {service} via {peer}")
    beside(kube_proxy(family, at(peer, APP_PORT)), family)
    lab.install(strict=True)

    with ExitStack() as stack:
        outbound = stack.enter_context(listening(lab.app, family, OUTBOUND, LOOPBACK[family]))
        server = stack.enter_context(listening(lab.peer, family, APP_PORT))
        captured = connect(lab.app, service, 443, outbound, server)
        assert captured.captured_from() == Address(service, 443)
        captured.close()
        own = marked(lab.app, family, 0x1000)
        connect(lab.app, service, 443, server, outbound, client=own).close()


@pytest.mark.parametrize("own", [False, True])
def test_a_host_firewall_sees_the_sidecars_port_behind_a_redirect(lab: Lab, beside: PutIn, own: bool) -> None:
    beside(ufw(22, APP_PORT, *([INBOUND] if own else [])))
    lab.install()
    with listening(lab.app, "ipv4", INBOUND) as inbound:
        if own:
            connect(lab.peer, lab.app.address, APP_PORT, inbound).close()
        else:
            with pytest.raises(ConnectionRefusedError):
                lab.peer.connect(lab.app.address, APP_PORT)


def test_a_host_firewall_sees_the_port_that_was_dialled_behind_tproxy(lab: Lab, beside: PutIn) -> None:
    beside(ufw(22, APP_PORT))
    lab.install(inbound_mode="tproxy", strict=True)

    with transparent(lab.app, "ipv4") as inbound:
        connect(lab.peer, lab.app.address, APP_PORT, inbound).close()
        with pytest.raises(ConnectionRefusedError):
            lab.peer.connect(lab.app.address, 9999)


@pytest.fixture
def ahead(lab: Lab) -> Iterator[PutIn]:
    """Puts somebody's rules in when ours are there, ahead of them; they are as they were in the end."""
    before: list[str] = []

    def put_in(rules: str, family: str = "ipv4") -> None:
        inserted = re.sub(r"^-A (PREROUTING|OUTPUT) ", r"-I \1 ", rules, flags=re.MULTILINE)
        lab.app.run(f"{command(lab, family)}-restore", "--noflush", stdin=inserted)
        before.extend(of_others(lab))
        assert before

    yield put_in
    assert of_others(lab) == before
    with lab.app.entered():
        remove(0.0)
    assert of_others(lab) == before


def command(lab: Lab, family: str = "ipv4") -> str:
    four = "iptables" if lab.backend.name == "nft" else COMMANDS[lab.backend.name]
    return four if family == "ipv4" else four.replace("iptables", "ip6tables")


def of_others(lab: Lab) -> list[str]:
    saved = "".join(lab.app.run(f"{command(lab, family)}-save").stdout for family in FAMILIES)
    return [line for line in saved.splitlines() if line.startswith("-A") and "MESHNET" not in line]


def repaired(lab: Lab, **settings: object) -> bool:
    """Whether there was something to repair: others that are asked before ours, and nothing else. Now there is not."""
    with lab.app.entered():
        plan = make_plan(capture(**settings), host_facts())
        lines = drift(plan, lab.backend, in_kernel())
        assert all("ahead of MESHNET_" in line for line in lines), lines
        changed = apply_plan(plan, lab.backend).changed
        assert changed == bool(lines)
        assert not drift(plan, lab.backend, in_kernel())
        assert not apply_plan(plan, lab.backend).changed
    return changed


def verdict(lab: Lab, target: str) -> str:
    return str(json.loads(lab.app.run("meshnet", "explain", target, "-o", "json").stdout)["verdict"])


def test_a_service_of_kube_proxy_whose_rules_came_later_is_captured_again(lab: Lab, family: str, ahead: PutIn) -> None:
    """istio#56414: kube-proxy puts its jumps first, so what they translate never came to ours."""
    service, app, peer = CLUSTER_IP[family], address_of(lab.app, family), address_of(lab.peer, family)
    dialled, other = at(service, 443), at(service, 80)
    lab.app.configure(f"route add {service} via {peer}")
    lab.install()

    with ExitStack() as stack:
        inbound = stack.enter_context(listening(lab.app, family, INBOUND))
        outbound = stack.enter_context(listening(lab.app, family, OUTBOUND, LOOPBACK[family]))
        server = stack.enter_context(listening(lab.peer, family, APP_PORT))
        opened = [
            connect(lab.app, service, 443, outbound, server),
            connect(lab.peer, app, APP_PORT, inbound),
        ]
        ahead(kube_proxy(family, at(peer, APP_PORT)), family)
        if lab.backend.name == "nft":  # its chain has a place of its own, ahead of all of iptables
            assert not repaired(lab)
            assert verdict(lab, dialled) == "captured"
        else:
            opened.append(connect(lab.app, service, 443, server, outbound))
            assert [verdict(lab, target) for target in (dialled, other)] == ["perhaps captured", "captured"]
            assert repaired(lab)
            assert verdict(lab, dialled) == "captured"
        captured = connect(lab.app, service, 443, outbound, server)
        assert captured.captured_from() == Address(service, 443)
        own = marked(lab.app, family, 0x1000)
        past = connect(lab.app, service, 443, server, outbound, client=own)
        for each in (*opened, captured, past):
            assert each.works()
            each.close()

    if lab.backend.name != "nft":
        jump = ("-t", "nat", "-{}", "OUTPUT", "-j", "KUBE-SERVICES")
        for verb in "DI":
            lab.app.run(command(lab, family), *(word.format(verb) for word in jump))
        with lab.app.entered():
            found = verify(capture())
        assert [canary.status for canary in found.canaries] == ["captured", "captured"]
        assert not found.ok
        assert found.differences == (
            f"{family}: ahead of MESHNET_OUT in OUTPUT: -j KUBE-SERVICES"
            f" (-p tcp -m tcp -j DNAT --to-destination {at(peer, APP_PORT)})",
        )
        assert repaired(lab)


def test_a_table_of_the_other_kind_that_is_made_later_is_told_and_nft_is_ahead_of_it(lab: Lab) -> None:
    """Two tables of one priority: the one made last is asked first, and neither can be put ahead of the other."""
    other = "iptables" if lab.backend.name == "legacy" else "iptables-legacy"
    to = ("-d", SERVICE, "-p", "tcp", "-j", "DNAT", "--to-destination", f"{lab.peer.address}:{APP_PORT}")
    lab.app.configure(f"route add {SERVICE}/32 via {lab.peer.address}")
    lab.install()
    lab.app.run(other, "-t", "nat", "-A", "OUTPUT", *to)
    is_first = lab.backend.name == "nft"
    with listening(lab.app, "ipv4", OUTBOUND, "127.0.0.1") as outbound, listening(lab.peer, "ipv4", APP_PORT) as server:
        ends = (outbound, server) if is_first else (server, outbound)
        connect(lab.app, SERVICE, 443, *ends).close()
    assert verdict(lab, f"{SERVICE}:443") == ("captured" if is_first else "perhaps captured")
    assert verdict(lab, "10.96.0.78:443") == "captured"
    said = lab.app.run("meshnet", "rules", "verify", MESHNET_CAPTURE__EXCLUDE_INBOUND_PORTS="").stdout
    assert ("may be asked before ours: table " in said) == (not is_first)
    assert ('capture.backend = "nft"' in said) == (not is_first)


@pytest.mark.parametrize("table", ["inet later", "ip later"])
def test_a_table_of_our_priority_that_is_made_later_is_put_behind_ours(lab: Lab, table: str) -> None:
    if lab.backend.name != "nft":  # it stands ahead of all of iptables, as its priority says
        return
    lab.app.configure(f"route add {SERVICE}/32 via {lab.peer.address}")
    lab.install()
    dnat = "dnat ip to" if table.startswith("inet") else "dnat to"
    rule = f"ip daddr {SERVICE} tcp dport 443 {dnat} {lab.peer.address}:{APP_PORT}"
    chain = f"chain c {{ type nat hook output priority {PLACES['MESHNET_OUT'].priority}; {rule}; }}"
    lab.app.run("nft", "-f", "-", stdin=f"table {table} {{ {chain}; }}")
    with lab.app.entered():
        found = verify(capture())
    assert found.differences == (f"ahead of MESHNET_OUT: chain c of table {table}, which was made later",)
    with listening(lab.app, "ipv4", OUTBOUND, "127.0.0.1") as outbound, listening(lab.peer, "ipv4", APP_PORT) as server:
        past = connect(lab.app, SERVICE, 443, server, outbound)
        assert repaired(lab)
        captured = connect(lab.app, SERVICE, 443, outbound, server)
        assert captured.captured_from() == Address(SERVICE, 443)
        for each in (past, captured):
            assert each.works()
            each.close()
    # One that was there before us is behind us, and is left alone.
    assert not repaired(lab)


def test_a_published_port_of_docker_whose_rules_came_later_is_captured_again(
    lab: Lab, family: str, container: Host, ahead: PutIn
) -> None:
    lab.install()
    app = address_of(lab.app, family)

    with ExitStack() as stack:
        inbound = stack.enter_context(listening(lab.app, family, INBOUND))
        published = stack.enter_context(listening(container, family, 80))
        older = connect(lab.peer, app, OTHER_PORT, inbound, published)
        ahead(docker(family), family)
        if lab.backend.name != "nft":
            connect(lab.peer, app, OTHER_PORT, published, inbound).close()
        assert repaired(lab) == (lab.backend.name != "nft")
        captured = connect(lab.peer, app, OTHER_PORT, inbound, published)
        assert captured.captured_from() == Address(app, OTHER_PORT)
        assert older.works()
        older.close()
        captured.close()
        lab.install(exclude_inbound_ports=[str(OTHER_PORT)])
        connect(lab.peer, app, OTHER_PORT, published, inbound).close()


def test_rules_that_let_pass_ahead_of_ours_hide_them_as_well(lab: Lab) -> None:
    """In one chain of iptables ACCEPT and RETURN are the end of it; another chain of nftables is asked still."""
    if lab.backend.name == "nft":
        return
    lab.install()
    for verdict in ("ACCEPT", "RETURN"):
        rule = ("OUTPUT", "-p", "tcp", "--dport", str(APP_PORT), "-j", verdict)
        with listening(lab.app, "ipv4", OUTBOUND, "127.0.0.1") as outbound, listening(lab.peer, "ipv4", APP_PORT) as it:
            lab.app.run(command(lab), "-t", "nat", "-I", *rule)
            connect(lab.app, lab.peer.address, APP_PORT, it, outbound).close()
            assert repaired(lab)
            connect(lab.app, lab.peer.address, APP_PORT, outbound, it).close()
        lab.app.run(command(lab), "-t", "nat", "-D", *rule)


def test_what_is_let_pass_ahead_of_a_transparent_listener_is_given_to_it_again(lab: Lab) -> None:
    if lab.backend.name == "nft":
        return
    tproxy = {"inbound_mode": "tproxy"}
    lab.install(**tproxy)
    rule = ("PREROUTING", "-p", "tcp", "--dport", str(APP_PORT), "-j", "ACCEPT")
    with transparent(lab.app, "ipv4") as inbound, listening(lab.app, "ipv4", APP_PORT) as application:
        lab.app.run(command(lab), "-t", "mangle", "-I", *rule)
        connect(lab.peer, lab.app.address, APP_PORT, application, inbound).close()
        assert repaired(lab, **tproxy)
        connect(lab.peer, lab.app.address, APP_PORT, inbound, application).close()


def test_what_decides_nothing_for_new_tcp_may_stand_ahead_of_ours(lab: Lab, ahead: PutIn) -> None:
    """ufw's chains are in another table; and who counts, logs or means UDP takes nothing away."""
    lab.install()
    ahead(
        ufw(22, INBOUND)
        + "*nat\n:COUNTED - [0:0]\n-A OUTPUT -j COUNTED\n-A COUNTED -p tcp -j RETURN\n"
        + "-A OUTPUT -p tcp -m tcp --dport 80\n-A OUTPUT -p udp -m udp --dport 53 -j REDIRECT --to-ports 5353\nCOMMIT\n"
    )
    assert not repaired(lab)
    with listening(lab.app, "ipv4", INBOUND) as inbound:
        connect(lab.peer, lab.app.address, APP_PORT, inbound).close()
