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
        self._to = _networks(capture.outbound_cidrs)
        self._not_to = _networks(capture.exclude_outbound_cidrs)
        self._by = frozenset(int(uid) for uid in capture.outbound_uids)
        self._not_by = frozenset(int(uid) for uid in capture.exclude_uids)
        self.not_judged: Mapping[Direction, str] = _not_judged(capture)

    def inbound(self, port: int, remote: bytes) -> bool:
        """Whether what comes in from the packed address `remote` for this host's `port` is to be captured."""
        return (
            port not in self._own_ports
            and self._has_family(remote)
            and _in_runs(port, self._inbound)
            and not _in_runs(port, self._not_inbound)
            and _in_networks(remote, self._from)
            and not _in_networks(remote, self._not_from)
        )

    def outbound(self, remote: bytes, port: int, uid: int) -> bool:
        """Whether what a program of `uid` sends to the packed address `remote` at `port` is to be captured."""
        return (
            self._has_family(remote)
            and (not self._by or uid in self._by)
            and uid not in self._not_by
            and _in_runs(port, self._outbound)
            and not _in_runs(port, self._not_outbound)
            and _in_networks(remote, self._to)
            and not _in_networks(remote, self._not_to)
        )

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
