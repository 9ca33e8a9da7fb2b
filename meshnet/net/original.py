"""Where a redirected connection was going before the kernel turned it to us.

SO_ORIGINAL_DST of linux/netfilter_ipv4.h and IP6T_SO_ORIGINAL_DST of linux/netfilter_ipv6/ip6_tables.h. A transparent
listener's connections were not turned: their own address is where they were going (kernel's tproxy.rst).
"""

import socket
import struct

from meshnet.errors import ConnectionFailed, Reason
from meshnet.model.address import Address, canonical_host
from meshnet.net.sockets import is_transparent, peer_address

_SO_ORIGINAL_DST = 80  # the same number for IPv4 and IPv6 (IP6T_SO_ORIGINAL_DST)
_SOL_IPV6 = 41
_V4_MAPPED = "::ffff:"


def original_destination(sock: socket.socket) -> Address:
    """The address the client dialled, for IPv4, IPv6 and v4-mapped sockets.

    Read it once, at accept: it lives in the conntrack entry, which may go. A connection made straight to our port
    yields our own address where conntrack runs. Raises ConnectionFailed(not_redirected) where it does not.
    """
    try:
        if sock.family == socket.AF_INET or sock.getsockname()[0].startswith(_V4_MAPPED):
            raw = sock.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16)
            port, packed = struct.unpack_from("!H4s", raw, 2)
            return Address(socket.inet_ntop(socket.AF_INET, packed), port)
        raw = sock.getsockopt(_SOL_IPV6, _SO_ORIGINAL_DST, 28)
        port, packed = struct.unpack_from("!H4x16s", raw, 2)
        return Address(canonical_host(socket.inet_ntop(socket.AF_INET6, packed)), port)
    except OSError as error:
        if is_transparent(sock):
            return peer_address(sock.getsockname())
        raise ConnectionFailed(Reason.NOT_REDIRECTED, f"no original destination: {error.strerror}") from error
