"""`meshnet init` and `meshnet rules`, as somebody types them."""

import subprocess
import sys

import msgspec
import pytest

from meshnet_init.apply import installed_rules
from meshnet_init.choose import every_backend
from meshnet_init.host import host_facts
from meshnet_init.rule import Rule
from tests.init.kernel import APP_PORT, INBOUND, connect, listening
from tests.world import Host, World

pytestmark = pytest.mark.netns

BACKENDS = ("nft", "iptables", "legacy")
NO_SIDECAR = (
    "sidecar: none answers at /run/meshnet/admin.sock; nothing was compared with one\n"
    "! new connections that the rules capture are refused until a sidecar runs\n"
)


@pytest.fixture
def host(world: World) -> Host:
    return world.host("app")


def run(host: Host, *arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = host.run("meshnet", *arguments, check=False, **environment)
    assert done.returncode == code, (done.stdout, done.stderr)
    return done


def in_force(host: Host) -> list[str]:
    with host.entered():
        return [backend.name for backend in every_backend() if backend.installed()]


def rules_in_force() -> list[tuple[str, list[Rule]]]:
    return [(installed.backend, [counted.rule for counted in installed.rules]) for installed in installed_rules()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_init_verify_show_and_remove(host: Host, backend: str) -> None:
    done = run(host, "init", "--backend", backend, "--verify")
    assert NO_SIDECAR in done.stdout
    assert f"in force ({backend})" in done.stdout
    assert "ipv4: captured" in done.stdout
    assert "ipv6: captured" in done.stdout
    assert in_force(host) == [backend]

    assert "nothing changed" in run(host, "init", "--backend", backend).stdout
    verified = run(host, "rules", "verify").stdout
    assert "as planned" in verified
    assert NO_SIDECAR in verified
    assert verified.endswith("fix: sudo meshnet up\n")
    shown = run(host, "rules", "show").stdout
    assert f"backend {backend}" in shown
    redirects = [line.split() for line in shown.splitlines() if "to the outbound proxy" in line]
    hits = [int(words[words.index(":15101") + 1]) for words in redirects]
    assert hits == ([4] if backend == "nft" else [2, 2])  # two canaries, sent twice

    assert f"rules removed ({backend})" in run(host, "init", "remove").stdout
    assert in_force(host) == []
    assert "no rules are installed" in run(host, "init", "remove").stdout
    assert "no rules are installed" in run(host, "rules", "show").stdout
    nothing = run(host, "rules", "verify", code=1).stdout
    assert "no rules are installed" in nothing
    assert nothing.endswith("fix: sudo meshnet up, or without a sidecar: sudo meshnet init\n")


def test_a_dry_run_prints_what_the_tools_take_and_changes_nothing(host: Host) -> None:
    for form, command in (("nft", ["nft", "-c", "-f", "-"]), ("iptables", None), ("json", None)):
        text = run(host, "init", "--dry-run", "--format", form, "--exclude-inbound-ports", "22,8000-8100").stdout
        assert in_force(host) == []
        if command:
            host.run(*command, stdin=text)
            assert "tcp dport 8000-8100 counter return" in text
        elif form == "iptables":
            four, six = text.split("# ip6tables-restore --noflush\n")
            host.run("iptables-restore", "--noflush", "--test", stdin=four)
            host.run("ip6tables-restore", "--noflush", "--test", stdin=six)
        else:
            assert any(rule.get("redirect") == 15101 for rule in msgspec.json.decode(text)["rules"])


def test_a_flag_beats_the_environment_which_beats_the_file(host: Host) -> None:
    file = host.directory / "meshnet.toml"
    file.write_text('[capture]\nexclude_outbound_ports = ["1111"]\nexclude_inbound_ports = ["3333"]\n')
    arguments = ["init", "--dry-run", "--config", str(file)]

    assert "dport 1111" in run(host, *arguments).stdout
    environment = {"MESHNET_CAPTURE__EXCLUDE_OUTBOUND_PORTS": "2222"}
    from_environment = run(host, *arguments, **environment).stdout
    assert "dport 2222" in from_environment
    assert "dport 1111" not in from_environment
    from_flag = run(host, *arguments, "--exclude-outbound-ports", "4444,5555", **environment).stdout
    assert "dport 4444" in from_flag
    assert "dport 5555" in from_flag
    assert "dport 2222" not in from_flag
    assert "dport 3333" in from_flag


def test_every_flag_reaches_the_rules(host: Host, real_root: bool) -> None:
    text = run(
        host,
        *("init", "--dry-run", "--inbound-port", "16106", "--outbound-port", "16101", "--inbound-ports", "81"),
        *(
            "--exclude-inbound-ports",
            "82",
            "--exclude-inbound-cidrs",
            "10.1.0.0/16,fd01::/16",
            "--outbound-ports",
            "83",
        ),
        *("--exclude-outbound-ports", "84", "--outbound-cidrs", "10.2.0.0/16", "--exclude-outbound-cidrs", "10.2.3.4"),
        *("--mark", "0x1234", "--gid", "4321", "--ipv6", "off"),
    ).stdout

    for part in (
        *("redirect to :16106", "redirect to :16101", "dport 81 ", "dport 82 ", "saddr 10.1.0.0/16", "dport 83 "),
        *("dport 84 ", "daddr 10.2.0.0/16", "daddr 10.2.3.4 ", "meta mark & 0x00001234 == 0x00001234", "nfproto ipv6"),
        *(("skgid 4321 ",) if real_root else ()),
    ):
        assert part in text
    assert "fd01" not in text


def test_every_flag_beside_the_redirects_reaches_the_rules(host: Host, real_root: bool) -> None:
    text = run(
        host,
        *("init", "--dry-run", "--inbound-mode", "tproxy", "--inbound-cidrs", "10.3.0.0/16"),
        *("--inbound-interfaces", "eth7,ens*", "--reroute-interfaces", "docker7", "--loopback-ports", "85"),
        *("--outbound-uids", "4711", "--outbound-gids", "4712", "--outbound-cgroups", "web.slice/a.service"),
        *("--exclude-uids", "4713", "--exclude-gids", "4714", "--exclude-cgroups", "web.slice/b.service"),
        *("--exclude-interfaces", "eth8", "--strict", "true", "--quic", "reject", "--udp", "reject"),
        *("--exclude-udp-ports", "86", "--ipv6", "reject"),
    ).stdout

    for part in (
        *("tproxy ip to :15106", "saddr 10.3.0.0/16", 'iifname "eth7"', 'iifname "ens*"', 'iifname "docker7"'),
        *("tcp dport 85 ", 'level 2 "web.slice/a.service"', 'level 2 "web.slice/b.service"', 'oifname "eth8"'),
        *("reject with tcp reset", "udp dport 443 counter reject", "meta l4proto udp counter reject", "udp dport 86 "),
        *(("skuid 4711 ", "skgid 4712 ", "skuid 4713 ", "skgid 4714 ") if real_root else ()),
    ):
        assert part in text, part
    carried = run(host, "init", "--dry-run", "--original-source", "true", "--local-mark", "0x8000").stdout
    assert ("0x00008000" in carried) is not host_facts().accepts_marks
    assert "ct state invalid" in run(host, "init", "--dry-run", "--drop-invalid", "true").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--inbound-ports", "http"], 2, "is not a port"),
        (["--outbound-cidrs", "10.0.0.1/8"], 2, "write 10.0.0.0/8"),
        (["--mark", "0"], 2, "is not a mark"),
        (["--mark", "abc"], 2, "'abc' is not a number; write 4096 or 0x1000"),
        (["--backend", "ipfw"], 2, "nft"),
        (["--gid", "0"], 2, "0 is not in the range 1<=x<=4294967294"),
        (["--exclude-inbound-ports", "*"], 2, "'*' would leave all alone"),
        (["--exclude-outbound-ports", "22,*"], 2, "'*' would leave all alone"),
        (["--exclude-inbound-cidrs", "*"], 2, "'*' would leave all alone"),
        (["--exclude-outbound-cidrs", "10.0.0.0/8,*"], 2, "'*' would leave all alone"),
        (["--inbound-port", "15101"], 78, "give each its own port"),
        (["--inbound-port", "15108"], 78, "give each its own port"),
        (["--outbound-port", "15120"], 78, "give each its own port"),
        (["--config", "/nowhere.toml"], 78, "/nowhere.toml"),
        (["remove", "--drain", "soon"], 2, "duration"),
    ],
)
def test_what_is_wrong_is_said_with_its_exit_code(host: Host, arguments: list[str], code: int, said: str) -> None:
    assert said in run(host, "init", *arguments, code=code).stderr
    assert in_force(host) == []


def test_a_backend_that_is_not_installed_is_told_with_what_to_type(host: Host) -> None:
    bare = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /usr/sbin && exec "$@"', "sh")
    done = host.run(*bare, "meshnet", "init", "--backend", "iptables", check=False)
    assert done.returncode == 1
    said = "error: backend iptables cannot be used here\nwhy: no iptables that writes nf_tables is installed\n"
    assert done.stderr.startswith(said)
    assert "fix: apt-get install iptables; or " in done.stderr
    assert host.run(*bare, "meshnet", "init").stdout.endswith("in force (nft)\n")


def test_the_probe_relay_s_port_is_the_sidecar_s_own_where_there_is_one(host: Host) -> None:
    checks = {"MESHNET_PROBES__CHECKS": '{"app/livez":{"type":"tcp","port":80}}'}
    assert "dport 15121 " in run(host, "init", "--dry-run", **checks).stdout
    assert "dport 15121 " not in run(host, "init", "--dry-run").stdout
    assert "give each its own port" in run(host, "init", "--inbound-port", "15121", code=78, **checks).stderr


def test_a_wrong_variable_is_named(host: Host) -> None:
    done = run(host, "init", code=78, MESHNET_CAPTURE__GID="many")

    assert "MESHNET_CAPTURE__GID" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "to"),
    [
        (["init"], "change"),
        (["init", "--backend", "iptables"], "change"),
        (["init", "remove"], "change"),
        (["rules", "show"], "read"),
        (["rules", "verify"], "read"),
    ],
)
def test_without_rights_three_lines_and_code_5(host: Host, arguments: list[str], to: str) -> None:
    done = host.run(
        *("setpriv", "--bounding-set=-all", "--inh-caps=-all", "meshnet", *arguments),
        check=False,
    )

    assert done.returncode == 5
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["error", "why", "fix"]
    assert done.stderr.startswith(f"error: not allowed to {to} the kernel's rules\n")
    assert "sudo" in done.stderr


@pytest.mark.parametrize("before", [[], ["--exclude-inbound-ports", "2022"]])
def test_when_verification_fails_what_was_before_comes_back(host: Host, before: list[str]) -> None:
    if before:
        run(host, "init", *before)
    with host.entered():
        old = rules_in_force()
    # Somebody's rule ahead of ours takes the canary away.
    host.run(
        "nft",
        "-f",
        "-",
        stdin="table inet ahead {\n chain out {\n type nat hook output priority -150;\n"
        " tcp dport 15122 redirect to :9\n }\n}\n",
    )

    done = run(host, "init", "--verify", code=7)

    assert "what was before is back" in done.stderr
    with host.entered():
        assert rules_in_force() == old


def test_remove_says_what_it_waits_for_and_what_it_cut(world: World, host: Host) -> None:
    peer = world.host("peer")
    run(host, "init")
    with listening(host, "ipv4", INBOUND) as inbound:
        opened = connect(peer, host.address, APP_PORT, inbound)

    done = run(host, "init", "remove", "--drain", "250ms")

    assert "waiting for 1 connection" in done.stderr
    assert "1 connection outlived the wait and was cut" in done.stdout
    opened.close()


def test_json_for_programs(host: Host) -> None:
    applied = msgspec.json.decode(run(host, "init", "--verify", "-o", "json").stdout)
    assert applied["applied"]["backend"] == "nft"
    assert applied["verification"]["ok"] is True
    plan = msgspec.json.decode(run(host, "rules", "plan", "-o", "json").stdout)
    shown = msgspec.json.decode(run(host, "rules", "show", "-o", "json").stdout)
    assert [rule["match"] for rule in shown["items"][0]["rules"]] == [rule["match"] for rule in plan["rules"]]
    assert [rule["why"] for rule in shown["items"][0]["rules"]] == [rule["why"] for rule in plan["rules"]]
    assert msgspec.json.decode(run(host, "rules", "verify", "-o", "json").stdout)["canaries"][0]["status"] == "captured"
    assert msgspec.json.decode(run(host, "init", "remove", "-o", "json").stdout)["backends"] == ["nft"]
    refused = run(host, "init", "-o", "json", "--inbound-port", "15101", code=78)
    assert msgspec.json.decode(refused.stderr)["exitCode"] == 78


def test_the_entry_point_of_an_init_container_is_the_same_command(host: Host) -> None:
    assert host.run("meshnet-init", "--dry-run").stdout == run(host, "init", "--dry-run").stdout


def test_help_does_not_wait_for_netlink() -> None:
    code = (
        "import sys, meshnet_cli.init, meshnet_cli.rules; "
        "sys.exit(any(name.partition('.')[0] in ('pyroute2', 'meshnet_init') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
