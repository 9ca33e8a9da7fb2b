"""What a network namespace is to who asks, as far as a plan depends on it."""

import ctypes
import os

import pytest

from meshnet_init.host import host_facts, may_change_rules
from tests.init.test_missing import in_child
from tests.world import World

pytestmark = pytest.mark.netns

_PR_SET_KEEPCAPS = 8  # linux/prctl.h
_NET_ADMIN = 1 << 12  # linux/capability.h
_NOBODY = 65534


def test_a_keeper_that_is_not_root_plans_as_root_does(world: World, real_root: bool) -> None:
    """The kernel lets NET_ADMIN write the network's switches; access(2) by itself asks for a real user's rights."""
    if not real_root:  # then there is no other user here
        return

    def seen_by_nobody() -> tuple[bool, bool]:
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # capset(2), version 3: effective and permitted
        assert libc.capset(header, (ctypes.c_uint32 * 6)(_NET_ADMIN, _NET_ADMIN)) == 0
        return may_change_rules(), host_facts().accepts_marks

    with world.host("app").entered():
        assert in_child(lambda: (may_change_rules(), host_facts().accepts_marks)) == "(True, True)"
        assert in_child(seen_by_nobody) == "(True, True)"
