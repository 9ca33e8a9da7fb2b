"""Looking at the wire between the hosts: every frame on every port of the switch, as it passes."""

import socket
import struct
import threading
from typing import Self

from meshnet_cli.demo.world import Host

_ETH_P_ALL = 0x0003
_SOL_PACKET, _PACKET_STATISTICS = 263, 6  # <linux/if_packet.h>
_FRAME = 1 << 18  # virtual links pass on more than 64 KiB at once
_PAUSE = 0.05  # seconds of silence after which everything that passed has been read


class Capture:
    """Counts frames, and those that hold `marker`, while the block runs; the figures are final after it."""

    def __init__(self, switch: Host, marker: bytes) -> None:
        self.frames = 0
        self.with_marker = 0
        self.lost = 0
        self.tcp_ports: set[int] = set()  # that a frame with payload came from or went to
        self._marker = marker
        self._stopping = threading.Event()
        with switch.entered():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
        self._socket.settimeout(_PAUSE)
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        _, self.lost = struct.unpack("II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        self._socket.close()

    def _read(self) -> None:
        while True:
            try:
                frame = self._socket.recv(_FRAME)
            except TimeoutError:
                if self._stopping.is_set():
                    return
                continue
            self.frames += 1
            self.with_marker += self._marker in frame
            self.tcp_ports |= payload_ports(frame)


def payload_ports(frame: bytes) -> set[int]:
    """Both ports of an Ethernet frame that carries TCP payload over IPv4 or IPv6; empty for any other."""
    kind = int.from_bytes(frame[12:14], "big")
    if kind == 0x0800 and len(frame) >= 34 and frame[23] == socket.IPPROTO_TCP:
        tcp = 14 + (frame[14] & 15) * 4
        end = 14 + int.from_bytes(frame[16:18], "big")
    elif kind == 0x86DD and len(frame) >= 54 and frame[20] == socket.IPPROTO_TCP:
        tcp = 54
        end = tcp + int.from_bytes(frame[18:20], "big")
    else:
        return set()
    if len(frame) < tcp + 20 or tcp + (frame[tcp + 12] >> 4) * 4 >= end:
        return set()
    return set(struct.unpack("!HH", frame[tcp : tcp + 4]))
