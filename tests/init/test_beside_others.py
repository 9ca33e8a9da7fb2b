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
    INBOUND,
    OTHER_PORT,
    OUTBOUND,
    Lab,
    capture,
    connect,
    listening,
)
from tests.init.sides import behind_a_bridge, marked
from tests.init.test_tproxy import transparent
from tests.world import Host

pytestmark = pytest.mark.netns

CONTAINER = "172.17.0.2"
CLUSTER_IP = "10.96.0.77"

# As Docker 24 writes them for one container that publishes its port 80 as 8081.
DOCKER = f"""*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport {OTHER_PORT} -j DNAT --to-destination {CONTAINER}:80
COMMIT
*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A DOCKER -d {CONTAINER}/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-USER -j RETURN
COMMIT
"""

# As kube-proxy writes them for a Service with one endpoint.
KUBE_PROXY = f"""*nat
:KUBE-SERVICES - [0:0]
:KUBE-SVC-API - [0:0]
:KUBE-SEP-API - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-SERVICES -d {CLUSTER_IP}/32 -p tcp -m tcp --dport 443 -j KUBE-SVC-API
-A KUBE-SVC-API ! -s 10.244.0.0/16 -j KUBE-MARK-MASQ
-A KUBE-SVC-API -j KUBE-SEP-API
-A KUBE-SEP-API -p tcp -m tcp -j DNAT --to-destination ENDPOINT
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
COMMIT
"""

# As ufw writes them after `ufw default reject incoming` and an `ufw allow` for each of ALLOWED.
UFW = """*filter
:INPUT ACCEPT [0:0]
:ufw-before-input - [0:0]
:ufw-user-input - [0:0]
:ufw-reject-input - [0:0]
-A INPUT -j ufw-before-input
-A INPUT -j ufw-reject-input
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -j ufw-user-input
ALLOWED
-A ufw-reject-input -p tcp -j REJECT --reject-with tcp-reset
COMMIT
"""


@pytest.fixture
def beside(lab: Lab) -> Iterator[Callable[[str], None]]:
    """Puts in somebody's rules, with none of ours there: with ours they are as they were, and without ours again."""
    before = ""

    def put_in(rules: str) -> None:
        nonlocal before
        command = "iptables-legacy" if lab.backend.name == "legacy" else "iptables"
        lab.app.run(f"{command}-restore", "--noflush", stdin=rules)
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
    lab: Lab, container: Host, beside: Callable[[str], None]
) -> None:
    beside(DOCKER)
    lab.install(exclude_inbound_ports=[str(OTHER_PORT)])

    with ExitStack() as stack:
        inbound = stack.enter_context(listening(lab.app, "ipv4", INBOUND))
        outbound = stack.enter_context(listening(lab.app, "ipv4", OUTBOUND, "127.0.0.1"))
        server = stack.enter_context(listening(lab.peer, "ipv4", APP_PORT))
        out = connect(container, lab.peer.address, APP_PORT, server, inbound, outbound)
        assert peer_address(out.server.getpeername()).host == lab.app.address
        published = stack.enter_context(listening(container, "ipv4", 80))
        connect(lab.peer, lab.app.address, OTHER_PORT, published, inbound, outbound).close()
        lab.install()
        captured = connect(lab.peer, lab.app.address, OTHER_PORT, inbound, published)
        assert captured.captured_from() == Address(lab.app.address, OTHER_PORT)
        assert out.works()
        for opened in (captured, out):
            opened.close()


@pytest.mark.parametrize("guarded", [False, True])
def test_containers_are_captured_where_that_is_asked_for_istio44996(
    lab: Lab, container: Host, beside: Callable[[str], None], guarded: bool
) -> None:
    beside(DOCKER)
    lab.install(reroute_interfaces=["docker0"], strict=guarded)

    with listening(lab.app, "ipv4", OUTBOUND) as outbound, listening(lab.peer, "ipv4", APP_PORT) as server:
        captured = connect(container, lab.peer.address, APP_PORT, outbound, server)
        assert captured.captured_from() == Address(lab.peer.address, APP_PORT)
        assert peer_address(captured.server.getpeername()).host == CONTAINER
        captured.close()


def test_a_service_of_kube_proxy_is_captured_as_dialled_and_the_proxy_gets_its_endpoint(
    lab: Lab, beside: Callable[[str], None]
) -> None:
    lab.app.configure(f"route add {CLUSTER_IP}/32 via {lab.peer.address}")
    beside(KUBE_PROXY.replace("ENDPOINT", f"{lab.peer.address}:{APP_PORT}"))
    lab.install(strict=True)

    with ExitStack() as stack:
        outbound = stack.enter_context(listening(lab.app, "ipv4", OUTBOUND, "127.0.0.1"))
        server = stack.enter_context(listening(lab.peer, "ipv4", APP_PORT))
        captured = connect(lab.app, CLUSTER_IP, 443, outbound, server)
        assert captured.captured_from() == Address(CLUSTER_IP, 443)
        captured.close()
        own = marked(lab.app, "ipv4", 0x1000)
        connect(lab.app, CLUSTER_IP, 443, server, outbound, client=own).close()


def allowed(*ports: int) -> str:
    rules = (f"-A ufw-user-input -p tcp -m tcp --dport {port} -j ACCEPT" for port in ports)
    return UFW.replace("ALLOWED", "\n".join(rules))


@pytest.mark.parametrize("own", [False, True])
def test_a_host_firewall_sees_the_sidecars_port_behind_a_redirect(
    lab: Lab, beside: Callable[[str], None], own: bool
) -> None:
    beside(allowed(22, APP_PORT, *([INBOUND] if own else [])))
    lab.install()
    with listening(lab.app, "ipv4", INBOUND) as inbound:
        if own:
            connect(lab.peer, lab.app.address, APP_PORT, inbound).close()
        else:
            with pytest.raises(ConnectionRefusedError):
                lab.peer.connect(lab.app.address, APP_PORT)


def test_a_host_firewall_sees_the_port_that_was_dialled_behind_tproxy(lab: Lab, beside: Callable[[str], None]) -> None:
    beside(allowed(22, APP_PORT))
    lab.install(inbound_mode="tproxy", strict=True)

    with transparent(lab.app, "ipv4") as inbound:
        connect(lab.peer, lab.app.address, APP_PORT, inbound).close()
        with pytest.raises(ConnectionRefusedError):
            lab.peer.connect(lab.app.address, 9999)


@pytest.fixture
def ahead(lab: Lab) -> Iterator[Callable[[str], None]]:
    """Puts somebody's rules in when ours are there, ahead of them; they are as they were in the end."""
    before: list[str] = []

    def put_in(rules: str) -> None:
        inserted = re.sub(r"^-A (PREROUTING|OUTPUT) ", r"-I \1 ", rules, flags=re.MULTILINE)
        lab.app.run(f"{command(lab)}-restore", "--noflush", stdin=inserted)
        before.extend(of_others(lab))
        assert before

    yield put_in
    assert of_others(lab) == before
    with lab.app.entered():
        remove(0.0)
    assert of_others(lab) == before


def command(lab: Lab) -> str:
    return "iptables" if lab.backend.name == "nft" else COMMANDS[lab.backend.name]


def of_others(lab: Lab) -> list[str]:
    saved = lab.app.run(f"{command(lab)}-save").stdout
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


def test_a_service_of_kube_proxy_whose_rules_came_later_is_captured_again(
    lab: Lab, ahead: Callable[[str], None]
) -> None:
    """istio#56414: kube-proxy puts its jumps first, so what they translate never came to ours."""
    service, other = f"{CLUSTER_IP}:443", f"{CLUSTER_IP}:80"
    lab.app.configure(f"route add {CLUSTER_IP}/32 via {lab.peer.address}")
    lab.install()

    with ExitStack() as stack:
        inbound = stack.enter_context(listening(lab.app, "ipv4", INBOUND))
        outbound = stack.enter_context(listening(lab.app, "ipv4", OUTBOUND, "127.0.0.1"))
        server = stack.enter_context(listening(lab.peer, "ipv4", APP_PORT))
        opened = [
            connect(lab.app, CLUSTER_IP, 443, outbound, server),
            connect(lab.peer, lab.app.address, APP_PORT, inbound),
        ]
        ahead(KUBE_PROXY.replace("ENDPOINT", f"{lab.peer.address}:{APP_PORT}"))
        if lab.backend.name == "nft":  # its chain has a place of its own, ahead of all of iptables
            assert not repaired(lab)
            assert verdict(lab, service) == "captured"
        else:
            opened.append(connect(lab.app, CLUSTER_IP, 443, server, outbound))
            assert [verdict(lab, target) for target in (service, other)] == ["perhaps captured", "captured"]
            assert repaired(lab)
            assert verdict(lab, service) == "captured"
        captured = connect(lab.app, CLUSTER_IP, 443, outbound, server)
        assert captured.captured_from() == Address(CLUSTER_IP, 443)
        own = marked(lab.app, "ipv4", 0x1000)
        past = connect(lab.app, CLUSTER_IP, 443, server, outbound, client=own)
        for each in (*opened, captured, past):
            assert each.works()
            each.close()

    if lab.backend.name != "nft":
        jump = ("-t", "nat", "-{}", "OUTPUT", "-j", "KUBE-SERVICES")
        for verb in "DI":
            lab.app.run(command(lab), *(word.format(verb) for word in jump))
        with lab.app.entered():
            found = verify(capture())
        assert [canary.status for canary in found.canaries] == ["captured", "captured"]
        assert not found.ok
        assert found.differences == (
            "ipv4: ahead of MESHNET_OUT in OUTPUT: -j KUBE-SERVICES"
            f" (-p tcp -m tcp -j DNAT --to-destination {lab.peer.address}:{APP_PORT})",
        )
        assert repaired(lab)


def test_a_table_of_the_other_kind_that_is_made_later_is_told_and_nft_is_ahead_of_it(lab: Lab) -> None:
    """Two tables of one priority: the one made last is asked first, and neither can be put ahead of the other."""
    other = "iptables" if lab.backend.name == "legacy" else "iptables-legacy"
    to = ("-d", CLUSTER_IP, "-p", "tcp", "-j", "DNAT", "--to-destination", f"{lab.peer.address}:{APP_PORT}")
    lab.app.configure(f"route add {CLUSTER_IP}/32 via {lab.peer.address}")
    lab.install()
    lab.app.run(other, "-t", "nat", "-A", "OUTPUT", *to)
    is_first = lab.backend.name == "nft"
    with listening(lab.app, "ipv4", OUTBOUND, "127.0.0.1") as outbound, listening(lab.peer, "ipv4", APP_PORT) as server:
        ends = (outbound, server) if is_first else (server, outbound)
        connect(lab.app, CLUSTER_IP, 443, *ends).close()
    assert verdict(lab, f"{CLUSTER_IP}:443") == ("captured" if is_first else "perhaps captured")
    assert verdict(lab, "10.96.0.78:443") == "captured"
    said = lab.app.run("meshnet", "rules", "verify", MESHNET_CAPTURE__EXCLUDE_INBOUND_PORTS="").stdout
    assert ("may be asked before ours: table " in said) == (not is_first)
    assert ('capture.backend = "nft"' in said) == (not is_first)


@pytest.mark.parametrize("table", ["inet later", "ip later"])
def test_a_table_of_our_priority_that_is_made_later_is_put_behind_ours(lab: Lab, table: str) -> None:
    if lab.backend.name != "nft":  # it stands ahead of all of iptables, as its priority says
        return
    lab.app.configure(f"route add {CLUSTER_IP}/32 via {lab.peer.address}")
    lab.install()
    dnat = "dnat ip to" if table.startswith("inet") else "dnat to"
    rule = f"ip daddr {CLUSTER_IP} tcp dport 443 {dnat} {lab.peer.address}:{APP_PORT}"
    chain = f"chain c {{ type nat hook output priority {PLACES['MESHNET_OUT'].priority}; {rule}; }}"
    lab.app.run("nft", "-f", "-", stdin=f"table {table} {{ {chain}; }}")
    with lab.app.entered():
        found = verify(capture())
    assert found.differences == (f"ahead of MESHNET_OUT: chain c of table {table}, which was made later",)
    with listening(lab.app, "ipv4", OUTBOUND, "127.0.0.1") as outbound, listening(lab.peer, "ipv4", APP_PORT) as server:
        past = connect(lab.app, CLUSTER_IP, 443, server, outbound)
        assert repaired(lab)
        captured = connect(lab.app, CLUSTER_IP, 443, outbound, server)
        assert captured.captured_from() == Address(CLUSTER_IP, 443)
        for each in (past, captured):
            assert each.works()
            each.close()
    # One that was there before us is behind us, and is left alone.
    assert not repaired(lab)


def test_a_published_port_of_docker_whose_rules_came_later_is_captured_again(
    lab: Lab, container: Host, ahead: Callable[[str], None]
) -> None:
    lab.install()

    with ExitStack() as stack:
        inbound = stack.enter_context(listening(lab.app, "ipv4", INBOUND))
        published = stack.enter_context(listening(container, "ipv4", 80))
        older = connect(lab.peer, lab.app.address, OTHER_PORT, inbound, published)
        ahead(DOCKER)
        if lab.backend.name != "nft":
            connect(lab.peer, lab.app.address, OTHER_PORT, published, inbound).close()
        assert repaired(lab) == (lab.backend.name != "nft")
        captured = connect(lab.peer, lab.app.address, OTHER_PORT, inbound, published)
        assert captured.captured_from() == Address(lab.app.address, OTHER_PORT)
        assert older.works()
        older.close()
        captured.close()
        lab.install(exclude_inbound_ports=[str(OTHER_PORT)])
        connect(lab.peer, lab.app.address, OTHER_PORT, published, inbound).close()


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


def test_what_decides_nothing_for_new_tcp_may_stand_ahead_of_ours(lab: Lab, ahead: Callable[[str], None]) -> None:
    """ufw's chains are in another table; and who counts, logs or means UDP takes nothing away."""
    lab.install()
    ahead(
        allowed(22, INBOUND)
        + "*nat\n:COUNTED - [0:0]\n-A OUTPUT -j COUNTED\n-A COUNTED -p tcp -j RETURN\n"
        + "-A OUTPUT -p tcp -m tcp --dport 80\n-A OUTPUT -p udp -m udp --dport 53 -j REDIRECT --to-ports 5353\nCOMMIT\n"
    )
    assert not repaired(lab)
    with listening(lab.app, "ipv4", INBOUND) as inbound:
        connect(lab.peer, lab.app.address, APP_PORT, inbound).close()
