"""Kernels that lack what a backend needs: what they say is said by a filter of system calls."""

import errno
import os
import socket
from collections.abc import Callable

import pytest

from meshnet.errors import CommandError
from meshnet_init.apply import choose, every_backend
from tests.init.kernel import Lab
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
        assert in_child(lambda: (without(*missing), choose("auto").name)[1]) == chosen


def test_a_kernel_with_neither_is_told_with_what_to_load_istio44118(world: World) -> None:
    with world.host("app").entered():
        said = in_child(lambda: (without("nf_tables", "the legacy tables"), choose("auto").name)[1])
    assert said.startswith("no way to put rules into this kernel; nft: ")
    assert "legacy: " in said
    assert "modprobe" in said


def test_a_backend_that_was_asked_for_by_name_is_not_replaced_by_another(lab: Lab) -> None:
    with lab.app.entered():
        said = in_child(lambda: (without("nf_tables", "the legacy tables"), choose(lab.backend.name).name)[1])
    # The binary says nothing of itself on a kernel without nf_tables: it is as if it were not there.
    assert said.startswith((f"backend {lab.backend.name} cannot be used here", "no iptables that writes nf_tables"))
    assert "--backend auto" in said or 'capture.backend = "auto"' in said


def test_what_holds_connections_is_put_in_by_a_backend_whose_kernel_can(world: World) -> None:
    with world.host("app").entered():
        assert choose("auto", holds=True).unavailable(holds=True) == ""
        for backend in every_backend():
            if backend.unavailable(holds=True):
                with pytest.raises(CommandError, match=f"backend {backend.name} cannot be used here") as refused:
                    choose(backend.name, holds=True)
                assert "queue" in refused.value.why
            else:
                assert choose(backend.name, holds=True).name == backend.name
