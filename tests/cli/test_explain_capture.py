"""`meshnet explain HOST:PORT`: by which of the kernel's rules a connection is captured, or why not."""

import json

import pytest

from tests.world import Host, World

pytestmark = pytest.mark.netns


@pytest.fixture
def host(world: World) -> Host:
    return world.host("app")


def explained(host: Host, *words: str, code: int = 0) -> str:
    done = host.run("meshnet", "explain", *words, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("backend", ["nft", "iptables"])
def test_the_rule_that_decides_is_named_with_its_reason_and_hits(host: Host, backend: str) -> None:
    host.run("meshnet", "init", "--backend", backend, "--exclude-outbound-ports", "25")
    with pytest.raises(ConnectionRefusedError):
        host.connect("10.77.0.1", 8080)

    text = explained(host, "10.77.0.1:8080")
    assert text.startswith("a program here -> 10.77.0.1:8080  outbound  captured\n")
    assert "unless      packets with the mark 0x1000: left alone by rule " in text
    assert "(made by the proxy)" in text
    assert "(to the outbound proxy)" in text
    assert "captured (redirect to :15101), 1 hits" in text

    told = json.loads(explained(host, "10.77.0.1:25", "-o", "json"))
    assert (told["verdict"], told["backend"], told["rule"]["action"]) == ("left alone", backend, "return")
    assert "dport 25" in told["rule"]["match"]


def test_what_comes_in_is_told_from_what_goes_out(world: World, host: Host) -> None:
    peer = world.host("peer")
    host.run("meshnet", "init")
    assert "inbound  captured\n" in explained(host, f"{host.address}:8080")
    assert "inbound  left alone\n" in explained(host, peer.address, f"{host.address}:22")
    assert "(capture.exclude_inbound_ports)" in explained(host, f"[{host.address6}]:22")
    own = explained(host, host.address, f"{host.address}:8080")
    assert "outbound  left alone\n" in own
    assert "(stays on this host)" in own
    passing = explained(host, peer.address, "10.1.2.3:80")
    assert "(only passes through this host)" in passing
    assert "note        neither end is this host" in passing
    host.configure("route del default")
    assert "note        this host has no route there" in explained(host, "10.1.2.3:80")


def test_other_programs_rules_ahead_of_ours_are_told(host: Host) -> None:
    host.run("meshnet", "init")
    table = (
        "table ip theirs { chain c { type nat hook output priority -150; tcp dport 8080 counter redirect to :9; }; }"
    )
    host.run("nft", "-f", "-", stdin=table)
    text = explained(host, "10.1.2.3:8080")
    assert "first asked table ip theirs, c, priority -150: tcp dport 8080 redirect to :9\n" in text
    assert "theirs" not in explained(host, "10.1.2.3:8081")


def test_without_rules_it_is_said_what_puts_them_in(host: Host) -> None:
    text = explained(host, "10.1.2.3:8080")
    assert "outbound  no rules\n" in text
    assert "note        no rules of meshnet are in force; sudo meshnet up puts them in\n" in text


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["10.1.2.3:many"], 2, "'10.1.2.3:many' is not HOST:PORT"),
        (["no such host:80"], 2, "is no address"),
        (["10.0.0.1", "10.0.0.2", "10.0.0.3:80"], 2, "at most FROM and HOST:PORT"),
    ],
)
def test_what_is_no_address_is_told(host: Host, words: list[str], code: int, said: str) -> None:
    assert said in explained(host, *words, code=code)


def test_without_the_right_to_read_rules_it_says_what_to_type(host: Host) -> None:
    limited = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "meshnet", "explain", "10.1.2.3:80")
    done = host.run(*limited, check=False)
    assert done.returncode == 5
    assert "sudo" in done.stderr
