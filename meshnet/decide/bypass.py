"""Which connections should have come through the sidecar by the settings, as far as a socket tells. Pure."""

from collections.abc import Iterable, Mapping, Sequence

from meshnet.model.address import Network, parse_network
from meshnet.model.connection import Direction
from meshnet.model.settings import CaptureSection, Settings

# A socket does not tell its program's group or cgroup, nor the interface that its packets use.
_OF_OTHERS = "reroute_interfaces"  # whose sockets are not of this host
_UNTOLD = ("_gids", "_cgroups", "_interfaces")

Run = tuple[int, int]


class CaptureScope:
    """What [capture] includes. Where a setting decides by what no socket tells, a direction is not judged at all."""

    def __init__(self, settings: Settings) -> None:
        capture = settings.capture
        self._own_ports = settings.own_ports()
        self._ipv6 = capture.ipv6 != "off"
        self._inbound = _runs(capture.inbound_ports)
        self._not_inbound = _runs(capture.exclude_inbound_ports)
        self._from = _networks(capture.inbound_cidrs)
        self._not_from = _networks(capture.exclude_inbound_cidrs)
        self._outbound = _runs(capture.outbound_ports)
        self._not_outbound = _runs(capture.exclude_outbound_ports)
        self._loopback = _runs(capture.loopback_ports)
        self._to = _networks(capture.outbound_cidrs)
        self._not_to = _networks(capture.exclude_outbound_cidrs)
        self._by = frozenset(int(uid) for uid in capture.outbound_uids)
        self._not_by = frozenset(int(uid) for uid in capture.exclude_uids)
        self.not_judged: Mapping[Direction, str] = _not_judged(capture)

    def inbound(self, port: int, remote: bytes) -> bool:
        """Whether what comes in from the packed address `remote` for this host's `port` is to be captured."""
        return not self.leaves_inbound(port, remote)

    def outbound(self, remote: bytes, port: int, uid: int) -> bool:
        """Whether what a program of `uid` sends to the packed address `remote` at `port` is to be captured."""
        return not self.leaves_outbound(remote, port, uid)

    def leaves_inbound(self, port: int, remote: bytes) -> str:
        """Why `inbound` is not so: the setting that leaves it alone."""
        if port in self._own_ports:
            return "the sidecar's own port"
        if not self._has_family(remote):
            return "capture.ipv6"
        if not _in_runs(port, self._inbound):
            return "capture.inbound_ports"
        if _in_runs(port, self._not_inbound):
            return "capture.exclude_inbound_ports"
        if not _in_networks(remote, self._from):
            return "capture.inbound_cidrs"
        return "capture.exclude_inbound_cidrs" if _in_networks(remote, self._not_from) else ""

    def leaves_outbound(self, remote: bytes, port: int, uid: int | None) -> str:
        """Why `outbound` is not so: the setting that leaves it alone. None as `uid`: whoever it is."""
        if not self._has_family(remote):
            return "capture.ipv6"
        if uid is not None and self._by and uid not in self._by:
            return "capture.outbound_uids"
        if uid in self._not_by:
            return "capture.exclude_uids"
        if not _in_runs(port, self._outbound):
            return "capture.outbound_ports"
        if _in_runs(port, self._not_outbound):
            return "capture.exclude_outbound_ports"
        if not _in_networks(remote, self._to):
            return "capture.outbound_cidrs"
        return "capture.exclude_outbound_cidrs" if _in_networks(remote, self._not_to) else ""

    def leaves_local(self, port: int) -> str:
        """The same of what this host sends to itself."""
        return "" if _in_runs(port, self._loopback) else "capture.loopback_ports"

    def _has_family(self, remote: bytes) -> bool:
        return self._ipv6 or len(remote) == 4


def _not_judged(capture: CaptureSection) -> dict[Direction, str]:
    found: dict[Direction, str] = {}
    default = CaptureSection()
    for name in capture.__struct_fields__:
        if name.endswith(_UNTOLD) and name != _OF_OTHERS and getattr(capture, name) != getattr(default, name):
            why = f"capture.{name} is set, and a socket does not tell that of itself"
            found.setdefault(Direction.OUTBOUND, why)
            if name.endswith("_interfaces"):
                found.setdefault(Direction.INBOUND, why)
    return found


def _runs(ports: Iterable[str]) -> tuple[Run, ...]:
    pairs = ((first, last or first) for first, _, last in (text.partition("-") for text in ports))
    return tuple((1, 65535) if first == "*" else (int(first), int(last)) for first, last in pairs)


def _in_runs(port: int, runs: Sequence[Run]) -> bool:
    return any(first <= port <= last for first, last in runs)


def _networks(texts: Iterable[str]) -> tuple[Network, ...]:
    return tuple(parse_network(each) for text in texts for each in (("0.0.0.0/0", "::/0") if text == "*" else (text,)))


def _in_networks(address: bytes, networks: Sequence[Network]) -> bool:
    number, bits = int.from_bytes(address, "big"), len(address) * 8
    return any(
        network.max_prefixlen == bits
        and number >> (bits - network.prefixlen) == int(network.network_address) >> (bits - network.prefixlen)
        for network in networks
    )
