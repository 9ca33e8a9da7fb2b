"""Whether a TCP peer is gone, as the kernel tells it (tcp(7), TCP_INFO; struct tcp_info of linux/tcp.h).

TCP_USER_TIMEOUT would end one that only does not read as well: what a closed window holds back counts, however often
the peer answers.
"""

import enum
import socket
import struct

_INFO = struct.Struct("=3xB20xI28xI84xI80xI")  # probes, unacked, last_ack_recv, notsent_bytes, snd_wnd
_PROBES = 3  # of a closed window, ever further apart, that may be lost


class Peer(enum.Enum):
    UP_TO_DATE = "up to date"  # nothing waits for it
    WAITED_FOR = "waited for"
    GONE = "gone"


def peer_of(sock: socket.socket, silence: float) -> Peer:
    """`silence`: seconds without an answer after which it is gone. One whose state cannot be asked is up to date."""
    try:
        told = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
        probes, unacked, last_ack, not_sent, window = _INFO.unpack(told)
    except (OSError, struct.error):
        return Peer.UP_TO_DATE
    if not unacked and not not_sent:
        return Peer.UP_TO_DATE
    answers = not window and probes < _PROBES
    return Peer.GONE if not answers and last_ack >= silence * 1000 else Peer.WAITED_FOR
