"""Whose connections, from where and by which interface: what settings include, on each backend, in both families."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from meshnet.model.address import Address
from meshnet_init.apply import apply_plan
from meshnet_init.backends import cgroups, differences
from meshnet_init.host import host_facts
from meshnet_init.plan import make_plan
from tests.init.kernel import APP_PORT, INBOUND, OUTBOUND, Lab, capture, connect, listening
from tests.init.sides import Sides, made_by, marked, prefix, route_through

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("kind", ["uid", "gid"])
def test_only_named_users_and_groups_are_captured(lab: Lab, sides: Sides, real_root: bool, kind: str) -> None:
    # Without root there is no id but 0, which is everybody's here.
    number = 4711 if real_root else 0
    lab.install(gid=15138, **{f"outbound_{kind}s": [str(number), "4712"]})

    sides.call_out(sides.outbound, client=made_by(lab.app, sides.family, kind, number))
    sides.call_out(sides.server if real_root else sides.outbound)
    sides.call_in(sides.inbound)


@pytest.fixture
def cgroup(real_root: bool) -> Iterator[str]:
    """One of our own; where none can be made, the one this process is in."""
    root = cgroups.root()
    ours = next(line[3:].strip() for line in Path("/proc/self/cgroup").read_text().splitlines() if line[:3] == "0::")
    name = f"meshnet-test-{os.getpid()}"
    if root is None or not real_root or not os.access(root, os.W_OK):
        yield ours.strip("/")
        return
    (root / name).mkdir()
    yield name
    (root / name).rmdir()


@pytest.mark.parametrize("which", ["exclude", "outbound"])
def test_cgroups_are_left_alone_or_the_only_ones_captured(lab: Lab, sides: Sides, cgroup: str, which: str) -> None:
    if not cgroup:  # the root, which no rule can tell from all
        pytest.fail("cgroup v2 is not writable here: run the tests as root, or in a cgroup of their own")
    settings = {f"{which}_cgroups": [cgroup]}
    lab.install(**settings)
    with lab.app.entered():
        plan = make_plan(capture(**settings), host_facts())
        assert differences(lab.backend.expected(plan), lab.backend.installed()) == []

    inside, outside = sides.server, sides.outbound
    if which == "outbound":
        inside, outside = outside, inside
    sides.call_out(inside, client=made_by(lab.app, sides.family, "cgroup", cgroup))
    if cgroup.startswith("meshnet-test"):
        sides.call_out(outside)


def test_a_cgroup_that_is_not_there_is_told_and_in_nobodys_way(lab: Lab, sides: Sides) -> None:
    with lab.app.entered():
        plan = make_plan(capture(exclude_cgroups=["no.slice/such.service"]), host_facts())
        assert apply_plan(plan, lab.backend).missing_cgroups == ("no.slice/such.service",)
        assert differences(lab.backend.expected(plan), lab.backend.installed()) == []
        assert not apply_plan(plan, lab.backend).changed
    sides.call_out(sides.outbound)


def test_only_named_clients_and_interfaces_are_captured(lab: Lab, sides: Sides) -> None:
    other = lab.world.host("other")
    lab.install(inbound_cidrs=[prefix(lab.peer, "ipv4", 32), prefix(lab.peer, "ipv6", 128)])
    sides.call_in(sides.inbound)
    sides.call_in(sides.application, source=other)

    lab.install(inbound_interfaces=["ens*", "eth1"])
    sides.call_in(sides.application)
    lab.install(inbound_interfaces=["ens*", "eth*"])
    sides.call_in(sides.inbound)


def test_what_comes_from_behind_a_bridge_goes_to_the_outbound_proxy_istio39775(lab: Lab, family: str) -> None:
    far, behind = route_through(lab, family)
    lab.install(reroute_interfaces=["eth*"], exclude_outbound_ports=["9000"])

    with ExitStack() as stack:
        outbound = stack.enter_context(listening(lab.app, family, OUTBOUND))
        inbound = stack.enter_context(listening(lab.app, family, INBOUND))
        rerouted = connect(lab.peer, behind, APP_PORT, outbound, inbound)
        assert rerouted.captured_from() == Address(behind, APP_PORT)
        assert rerouted.works()
        rerouted.close()
        # To this host itself it comes in like anything else.
        host = lab.app.address if family == "ipv4" else lab.app.address6
        connect(lab.peer, host, APP_PORT, inbound, outbound).close()
        server = stack.enter_context(listening(far, family, 9000))
        connect(lab.peer, behind, 9000, server, outbound, inbound).close()


def test_the_mark_with_other_bits_beside_it_is_the_proxys(lab: Lab, sides: Sides) -> None:
    lab.install()

    sides.call_out(sides.server, client=marked(lab.app, sides.family, 0x4000 | 0x1000))


def test_a_cgroup_that_has_gone_is_told_by_its_number() -> None:
    assert cgroups.cgroup_path(2**63) == f"?{2**63}"
