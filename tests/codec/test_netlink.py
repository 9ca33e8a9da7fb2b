"""Netlink's messages and attributes: what is written is read again, and nothing that is read does harm."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.codec import netlink

KINDS = st.integers(16, 0x3FFF)
VALUES = st.binary(max_size=40)


@given(st.lists(st.tuples(KINDS, st.lists(st.tuples(KINDS, VALUES), max_size=4)), max_size=4))
def test_what_is_written_is_read(told: list[tuple[int, list[tuple[int, bytes]]]]) -> None:
    data = b"".join(
        netlink.message(kind, netlink.REQUEST, b"".join(netlink.attribute(*each) for each in each_told))
        for kind, each_told in told
    )
    found = [
        (kind, [(name, bytes(value)) for name, value in netlink.attributes(body)])
        for kind, body in netlink.messages(data)
    ]
    assert found == told


@given(st.binary(max_size=200))
def test_anything_is_read_up_to_what_is_none(data: bytes) -> None:
    for _, body in netlink.messages(data):
        assert all(len(value) <= len(body) for _, value in netlink.attributes(body))
    assert sum(4 + len(value) for _, value in netlink.attributes(memoryview(data))) <= len(data) + 3


@given(st.integers(0, 76))
def test_a_message_that_is_cut_short_is_not_read(size: int) -> None:
    data = netlink.message(16, 0, bytes(20)) + netlink.message(17, 0, bytes(24))
    assert [kind for kind, _ in netlink.messages(data[:size])] == [16, 17][: (size >= 36) + (size >= 76)]


def test_an_errno_is_told_and_an_answer_without_one_is_none() -> None:
    ((kind, body),) = netlink.messages(netlink.message(netlink.ERROR, 0, struct.pack("=i", -13)))
    assert (kind, netlink.errno_in(body)) == (netlink.ERROR, 13)
    with pytest.raises(ValueError, match="no errno"):
        netlink.errno_in(memoryview(b"abc"))
