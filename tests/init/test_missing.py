"""Kernels that lack what a backend needs: they are refused a system call by a filter, or asked for what they lack."""

import errno
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from meshnet.errors import CommandError
from meshnet_init.backends import iptables_binaries, nft
from meshnet_init.choose import choose, choose_for, every_backend
from meshnet_init.host import host_facts
from meshnet_init.plan import make_plan
from meshnet_init.rule import Plan
from tests.init.kernel import Lab, capture
from tests.lesser_kernel import lacking
from tests.seccomp import Refusal, refuse
from tests.world import World

pytestmark = pytest.mark.netns

_NETFILTER = 12  # NETLINK_NETFILTER, linux/netlink.h
_IPT_SO_GET_INFO = 64  # linux/netfilter_ipv4/ip_tables.h; the same number for IPv6


def without(*missing: str) -> None:
    """From here on this process and its children are refused as by a kernel without nf_tables or the legacy tables."""
    refuse(*(_MISSING[name] for name in missing))


_MISSING = {
    "nf_tables": Refusal("socket", {0: socket.AF_NETLINK, 2: _NETFILTER}, errno.EPROTONOSUPPORT),
    "the legacy tables": Refusal("getsockopt", {2: _IPT_SO_GET_INFO}, errno.ENOPROTOOPT),
}


def in_child(work: Callable[[], object]) -> str:
    """What it returns, or the error it raises, in words."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = str(work())
        except CommandError as error:
            said = f"{error.what}; {error.why}; {error.fix}"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said


@pytest.mark.parametrize(
    ("missing", "chosen"),
    [((), "nft"), (("the legacy tables",), "nft"), (("nf_tables",), "legacy")],
    ids=["nothing", "legacy tables", "nf_tables"],
)
def test_auto_takes_what_the_kernel_has_istio28897(world: World, missing: tuple[str, ...], chosen: str) -> None:
    with world.host("app").entered():
        assert in_child(lambda: (without(*missing), choose("auto", plan_of()).backend.name)[1]) == chosen


def test_a_kernel_with_neither_is_told_with_what_to_load_istio44118(world: World) -> None:
    with world.host("app").entered():
        said = in_child(lambda: (without("nf_tables", "the legacy tables"), choose("auto", plan_of()).backend.name)[1])
    assert said.startswith("no way to put rules into this kernel; nft: ")
    assert "legacy: " in said
    assert "modprobe" in said


@pytest.mark.parametrize("subsystem", [0, 200], ids=["nobody registered", "no subsystem"])
def test_a_kernel_with_nfnetlink_alone_takes_nothing_by_nft_istio28897(
    world: World, monkeypatch: pytest.MonkeyPatch, subsystem: int
) -> None:
    """It answers for the batch as a whole: we ask for a subsystem that no kernel has."""
    monkeypatch.setattr(nft, "NFNL_SUBSYS_NFTABLES", subsystem)
    error = pytest.raises(CommandError, match="backend nft cannot be used here")
    with world.host("app").entered(), error as refused:
        choose("nft", plan_of())
    assert "the kernel's nftables has no table: " in refused.value.why
    assert refused.value.fix.startswith("modprobe nf_tables")


def test_a_backend_that_was_asked_for_by_name_is_not_replaced_by_another(lab: Lab) -> None:
    with lab.app.entered():
        said = in_child(
            lambda: (without("nf_tables", "the legacy tables"), choose(lab.backend.name, plan_of()).backend.name)[1]
        )
    # The binary says nothing of itself on a kernel without nf_tables: it is as if it were not there.
    assert said.startswith((f"backend {lab.backend.name} cannot be used here", "no iptables that writes nf_tables"))
    assert "--backend auto" in said or 'capture.backend = "auto"' in said


def plan_of(**values: object) -> Plan:
    return make_plan(capture(**values), host_facts())


def chosen(**values: object) -> str:
    """The backend for settings with these values and what is to be said of it, or why there is none, in words."""
    try:
        choice = choose_for(settings := capture(**values), make_plan(settings, host_facts()))
    except CommandError as error:
        return f"{error.what}: {error.why}. {error.fix}"
    return ". ".join((choice.backend.name, *choice.notes))


def test_what_holds_connections_is_put_in_by_a_backend_whose_kernel_can(world: World) -> None:
    with world.host("app").entered():
        plan = plan_of(truthful_connect=True)
        assert not choose("auto", plan).backend.unavailable(plan)
        for backend in every_backend():
            if backend.unavailable(plan):
                with pytest.raises(CommandError, match=f"backend {backend.name} cannot be used here") as refused:
                    choose(backend.name, plan)
                assert "queue" in refused.value.why
            else:
                assert choose(backend.name, plan).backend.name == backend.name


# What is missing; what is set; whom auto takes then, and what it says of whom it has passed over.
PASSED_OVER = [
    (["tproxy"], {"inbound_mode": "tproxy"}, "iptables", ["nft", "no tproxy:", "(modprobe nft_tproxy)"]),
    (["reject"], {"strict": True}, "iptables", ["nft", "no reject:", "(modprobe nft_reject_inet)"]),
    (["fib"], {}, "iptables", ["nft", "no fib daddr type:", "(modprobe nft_fib_inet)"]),
    (["reject", "REJECT"], {"inbound_mode": "tproxy"}, "nft", []),
    (["tproxy", "TPROXY", "socket", "cgroup"], {"strict": True, "drop_invalid": True, "udp": "reject"}, "nft", []),
]


@pytest.mark.parametrize(("names", "values", "taken", "said"), PASSED_OVER, ids=lambda it: "+".join(map(str, it)))
def test_auto_passes_over_whose_kernel_lacks_a_kind_of_rule_that_the_plan_has(
    world: World, names: list[str], values: dict[str, object], taken: str, said: list[str]
) -> None:
    with world.host("app").entered():
        found = lacking(names, lambda: chosen(**values))
    assert found.startswith(taken), found
    assert ("passed over" in found) == bool(said)
    assert [part for part in said if part not in found] == [], found


# What is missing, by its name in the backend; the module that has it; what is set; without what it would do.
KINDS = [
    ("TPROXY", "{}t_TPROXY", {"inbound_mode": "tproxy", "drop_invalid": True}, "capture.inbound_mode"),
    ("REJECT", "{}t_REJECT", {"strict": True, "udp": "reject"}, "capture.strict, capture.udp"),
    ("NFQUEUE", "{}t_NFQUEUE", {"truthful_connect": True, "exclude_uids": ["7"]}, "capture.truthful_connect"),
    ("owner", "{}t_owner", {"exclude_uids": ["7"]}, ""),
]


@pytest.mark.parametrize("backend", ["iptables", "legacy"])
@pytest.mark.parametrize(("name", "module", "values", "without_it"), KINDS, ids=[kind[0] for kind in KINDS])
def test_a_kind_that_one_familys_tables_lack_is_named_with_what_to_type(
    world: World, family: str, backend: str, name: str, module: str, values: dict[str, object], without_it: str
) -> None:
    with world.host("app").entered():
        found = lacking([name], lambda: chosen(backend=backend, **values), family)
    ours, others = ("ip", "ip6") if family == "ipv4" else ("ip6", "ip")
    assert found.startswith(f"backend {backend} cannot be used here: {backend}: {ours}tables takes no -"), found
    # A match that nothing else in its table has is named, too.
    command = "modprobe -a nft_compat" if backend == "iptables" else "modprobe(?: -a)?"
    assert re.search(rf"\. {command} {module.format(ours)}[; ]", found), found
    assert module.format(others) not in found
    assert (f"do without {without_it};" in found) == bool(without_it), found
    assert found.endswith("leave the choice to meshnet: --backend auto")


@pytest.mark.parametrize(
    ("backend", "modules"),
    [
        ("iptables", {"ipv4": "nft_chain_nat", "ipv6": "nft_chain_nat"}),
        ("legacy", {"ipv4": "iptable_nat", "ipv6": "ip6table_nat"}),
    ],
)
def test_a_table_that_a_kernel_lacks_is_loaded_by_the_module_of_its_kind(
    world: World, family: str, backend: str, modules: dict[str, str]
) -> None:
    with world.host("app").entered():
        found = lacking(["nat"], lambda: chosen(backend=backend), family)
    assert "tables takes no -t nat: " in found, found
    assert f". modprobe {modules[family]}; or leave the choice" in found


def test_a_family_whose_program_is_not_installed_is_told_so(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("iptables", "iptables-save", "iptables-restore"):
        (tmp_path / name).symlink_to(f"/usr/sbin/{name}")
    monkeypatch.setattr(iptables_binaries, "_PATH", str(tmp_path))
    with world.host("app").entered():
        found = chosen(backend="iptables")
    assert found == (
        "backend iptables cannot be used here: iptables: ip6tables-restore is not installed."
        " install iptables, or use --backend nft, or --ipv6 off; or leave the choice to meshnet: --backend auto"
    )


def test_several_modules_are_loaded_by_one_command(world: World) -> None:
    with world.host("app").entered():
        found = lacking(["tproxy", "reject"], lambda: chosen(backend="nft", inbound_mode="tproxy", strict=True))
    assert ". modprobe -a nft_reject_inet nft_tproxy; or do without" in found


def test_where_no_backend_has_it_each_says_what_it_lacks(world: World) -> None:
    with world.host("app").entered():
        found = lacking(["tproxy", "TPROXY"], lambda: chosen(inbound_mode="tproxy", strict=True))
    assert found.startswith(
        "no way to put rules into this kernel: nft: the kernel's nftables has no tproxy: No such file"
    )
    for part in ("; iptables: iptables takes no -j TPROXY: ", "; legacy: iptables takes no -j TPROXY: "):
        assert part in found
    assert (
        "modprobe nft_tproxy; or modprobe -a nft_compat ipt_TPROXY && modprobe -a nft_compat ip6t_TPROXY;"
        " or modprobe ipt_TPROXY && modprobe ip6t_TPROXY; or do without capture.in" in found
    )


def test_whoever_puts_the_rules_in_hears_who_was_passed_over(world: World) -> None:
    host = world.host("app")

    def put_in() -> str:
        done = host.run("meshnet", "init", "--inbound-mode", "tproxy", check=False)
        return done.stdout + done.stderr

    found = lacking(["tproxy"], put_in)
    assert "warning: nft was passed over: the kernel's nftables has no tproxy: No such file or directory" in found
    assert "(iptables)" in found
