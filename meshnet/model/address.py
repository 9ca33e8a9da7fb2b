"""Where a socket is."""

import functools
import ipaddress
import re

import msgspec

# Below the root of cgroup v2, of what the kernel takes that which no program has to quote or could take for an option.
CGROUPS = re.compile(r"(?!-|.*(?:^|/)\.{1,2}(?:/|$))[A-Za-z0-9_.@:-]+(?:/[A-Za-z0-9_.@:-]+)*", re.ASCII)
# A name, or the beginning of names with `*` behind it: at most IFNAMSIZ - 1 bytes, and of what the kernel takes
# (dev_valid_name) that which no program has to quote.
INTERFACES = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,14}|[A-Za-z0-9_][A-Za-z0-9_.@-]{0,13}\*", re.ASCII)

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_DNS_NAMES = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?", re.ASCII)


class Address(msgspec.Struct, frozen=True, order=True, gc=False):
    """An IP address in canonical text and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_v6(self) -> bool:
        return ":" in self.host


@functools.lru_cache(maxsize=4096)  # asked for every connection, of few addresses
def canonical_host(text: str) -> str:
    """The one spelling of an IP address; a v4-mapped IPv6 address becomes the IPv4 it stands for.

    Raises ValueError when `text` is not an IP address.
    """
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(address)


def parse_address(text: str) -> Address:
    """`10.0.0.1:80` or `[fd00::1]:80`. Raises ValueError on anything else."""
    host, separator, port = text.rpartition(":")
    if not separator or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not HOST:PORT")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r}: write an IPv6 address as [ADDRESS]:PORT")
    return Address(canonical_host(host), int(port))


def is_dns_name(text: str) -> bool:
    """Whether it can be the name of a host, with or without the dot at its end; an IP address is none."""
    last = text.rstrip(".").rpartition(".")[2]
    return len(text) <= 254 and not last.isdecimal() and _DNS_NAMES.fullmatch(text) is not None


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def parse_network(text: str) -> Network:
    """A CIDR such as `10.0.0.0/8`, or one address; v4-mapped blocks become IPv4. Raises ValueError.

    Host bits must be zero.
    """
    network = ipaddress.ip_network(text)
    mapped = network.network_address.ipv4_mapped if isinstance(network, ipaddress.IPv6Network) else None
    if mapped is not None and network.prefixlen >= 96:
        return ipaddress.IPv4Network((mapped, network.prefixlen - 96))
    return network
