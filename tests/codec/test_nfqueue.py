"""The queue's messages: what a kernel has sent is read, what nft has sent is written, and nothing breaks the reader."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.codec import nfqueue
from meshnet.codec.nfqueue import Packet, Syn, packets, syn_in
from meshnet.model.address import Address

# From Linux 6.18: connect() from 10.9.0.1 to 10.9.0.77, port 80.
SYN = bytes.fromhex(
    "4500003cadf140004006786b0a0900010a09004db7e60050bca5af4b00000000a002ffd767c90000"
    "0204ffd70402080ac40be9a4000000000103030a"
)
SYN6 = bytes.fromhex("6" + "0" * 7 + "0028" + "0640" + "fd77" + "0" * 27 + "2" + "fd96" + "0" * 26 + "10") + SYN[20:]


def packet(number: int, payload: bytes, mark: int = 0) -> bytes:
    """As the kernel sends one: its header, the outgoing interface, the mark if there is one, the payload."""
    parts = [(1, struct.pack("!IHBB", number, 0x0800, 3, 0)), (6, struct.pack("!I", 1))]
    parts += [(3, struct.pack("!I", mark))] if mark else []
    attributes = b"".join(
        (struct.pack("=HH", 4 + len(value), kind) + value).ljust((7 + len(value)) // 4 * 4, b"\0")
        for kind, value in [*parts, (10, payload)]
    )
    return struct.pack("=IHHII", 20 + len(attributes), 3 << 8, 0, 0, 0) + struct.pack("!BBH", 2, 0, 7) + attributes


def test_a_packet_is_read_with_its_number_its_mark_and_its_beginning() -> None:
    data = packet(1, SYN) + packet(2**32 - 1, SYN6, mark=0x10)
    assert list(packets(data)) == [Packet(1, 0, SYN), Packet(2**32 - 1, 0x10, SYN6)]


def test_a_complaint_is_no_packet() -> None:
    complaint = struct.pack("=IHHIIi", 36, 2, 0, 0, 0, -2) + bytes(16)
    assert list(packets(complaint + packet(3, SYN))) == [Packet(3, 0, SYN)]
    assert nfqueue.error_in(complaint) == 2
    with pytest.raises(ValueError, match="not an answer"):
        nfqueue.error_in(packet(3, SYN))


def test_a_syn_says_whose_it_is_in_both_families() -> None:
    assert syn_in(SYN) == Syn(Address("10.9.0.1", 47078), Address("10.9.0.77", 80), 0xBCA5AF4B)
    assert syn_in(SYN6) == Syn(Address("fd77::2", 47078), Address("fd96::10", 80), 0xBCA5AF4B)


def test_options_of_ipv4_are_passed_over() -> None:
    assert syn_in(bytes([0x46]) + SYN[1:20] + bytes(4) + SYN[20:]) == syn_in(SYN)


@pytest.mark.parametrize(
    "payload", [b"", b"\x40" + bytes(7), SYN[:27], SYN6[:47], SYN[:9] + b"\x11" + SYN[10:], b"\x41" + SYN[1:]]
)
def test_what_is_no_syn_that_can_be_read_is_none(payload: bytes) -> None:
    assert syn_in(payload) is None


@given(st.binary(max_size=200))
def test_whatever_comes_is_read_or_passed_over(data: bytes) -> None:
    for found in packets(data):
        syn_in(found.payload)
    syn_in(data)


@given(st.binary(max_size=100), st.integers(0, 120))
def test_a_packet_cut_short_is_passed_over(payload: bytes, length: int) -> None:
    whole = packet(7, payload)
    assert list(packets(whole[: min(length, len(whole) - 1)])) == []


def test_a_verdict_is_as_the_kernel_wants_it() -> None:
    head = struct.pack("=HHII", 3 << 8 | 1, 1, 0, 0) + struct.pack("!BBH", 0, 0, 15101)
    accepted = struct.pack("=HH", 12, 2) + struct.pack("!II", 1, 9)
    marked = struct.pack("=HH", 8, 3) + struct.pack("!I", 0x1001)
    assert nfqueue.verdict(15101, 9) == struct.pack("=I", 32) + head + accepted
    assert nfqueue.verdict(15101, 9, 0x1001) == struct.pack("=I", 40) + head + accepted + marked
