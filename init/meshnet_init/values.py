"""Ports and CIDRs as settings write them, in one canonical form. Nothing else gets into a rule."""

import ipaddress
import re
from collections.abc import Iterable

import msgspec

from meshnet.errors import ConfigError
from meshnet.model.address import CGROUPS, INTERFACES, Network

ANYTHING = "*"

_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", re.ASCII)
_LAST_PORT = 65535
_ID = re.compile(r"[0-9]{1,10}", re.ASCII)
_LAST_ID = 2**32 - 2  # the one behind it means "nobody" to the kernel


class Ports(msgspec.Struct, frozen=True, order=True):
    """A run of TCP ports, both ends included."""

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"

    def __contains__(self, port: int) -> bool:
        return self.first <= port <= self.last


ALL_PORTS = Ports(1, _LAST_PORT)


def parse_ports(texts: Iterable[str], setting: str) -> tuple[Ports, ...]:
    """`22`, `8000-8100` or `*`, sorted, overlapping and adjacent runs joined. Raises ConfigError naming `setting`."""
    joined: list[Ports] = []
    for run in sorted(_ports(text, setting) for text in texts):
        if joined and run.first <= joined[-1].last + 1:
            joined[-1] = Ports(joined[-1].first, max(joined[-1].last, run.last))
        else:
            joined.append(run)
    return tuple(joined)


def parse_networks(texts: Iterable[str], setting: str) -> tuple[Network, ...]:
    """CIDRs, addresses or `*`: IPv4 first, sorted, contained ones left out. Raises ConfigError naming `setting`."""
    v4: list[ipaddress.IPv4Network] = []
    v6: list[ipaddress.IPv6Network] = []
    for text in texts:
        for network in _EVERYWHERE if text == ANYTHING else (_network(text, setting),):
            if isinstance(network, ipaddress.IPv4Network):
                v4.append(network)
            else:
                v6.append(network)
    return (*ipaddress.collapse_addresses(v4), *ipaddress.collapse_addresses(v6))


def parse_ids(texts: Iterable[str], setting: str) -> tuple[int, ...]:
    """Numbers of users or groups, sorted, each once. Raises ConfigError naming `setting`.

    Names are not taken: who they are may differ where the rules are read (istio#48416).
    """
    return tuple(sorted({_id(text, setting) for text in texts}))


def parse_interfaces(texts: Iterable[str], setting: str) -> tuple[str, ...]:
    """Names, or beginnings of names with `*` behind, sorted, each once. Raises ConfigError naming `setting`."""
    for text in texts:
        if INTERFACES.fullmatch(text) is None:
            raise ConfigError(f"{setting}: {text!r} is not an interface", suggestion="write docker0 or veth*")
        if text == "lo":
            raise ConfigError(f"{setting}: lo is never captured", suggestion="leave it out")
    return tuple(sorted(set(texts)))


def parse_cgroups(texts: Iterable[str], setting: str) -> tuple[str, ...]:
    """Paths below the root of cgroup v2, without a slash in front, sorted, each once. Raises ConfigError."""
    for text in texts:
        if CGROUPS.fullmatch(text) is None:
            raise ConfigError(
                f"{setting}: {text!r} is not a cgroup", suggestion="write its path, such as system.slice/cron.service"
            )
    return tuple(sorted(set(texts)))


_EVERYWHERE: tuple[Network, ...] = (ipaddress.IPv4Network("0.0.0.0/0"), ipaddress.IPv6Network("::/0"))


def _ports(text: str, setting: str) -> Ports:
    if text == ANYTHING:
        return ALL_PORTS
    match = _PORTS.fullmatch(text)
    if match is None:
        raise ConfigError(f"{setting}: {text!r} is not a port", suggestion="write 8080, 8000-8100 or *")
    first, last = int(match[1]), int(match[2] or match[1])
    if first > last:
        raise ConfigError(f"{setting}: {text!r} ends before it starts", suggestion=f"write {last}-{first}")
    if first < 1 or last > _LAST_PORT:
        raise ConfigError(f"{setting}: {text!r} is out of range", suggestion=f"ports go from 1 to {_LAST_PORT}")
    return Ports(first, last)


def _id(text: str, setting: str) -> int:
    if _ID.fullmatch(text) is None or int(text) > _LAST_ID:
        raise ConfigError(f"{setting}: {text!r} is not an id", suggestion="write its number, as `id` prints it")
    return int(text)


def _network(text: str, setting: str) -> Network:
    if "%" in text:
        raise ConfigError(f"{setting}: {text!r} names an interface", suggestion=f"write {text.partition('%')[0]}")
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        raise ConfigError(f"{setting}: {text!r} is not a CIDR", suggestion=_closest(text)) from None
    if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped is not None:
        mapped = network.network_address.ipv4_mapped
        raise ConfigError(
            f"{setting}: {text!r} never crosses the wire as IPv6",
            suggestion=f"write {mapped}/{max(network.prefixlen - 96, 0)}",
        )
    return network


def _closest(text: str) -> str:
    try:
        return f"write {ipaddress.ip_network(text, strict=False)}: bits after the prefix must be zero"
    except ValueError:
        return "write 10.0.0.0/8, fd00::/8 or *"
