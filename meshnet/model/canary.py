"""Where one connects to find out whether the rules capture: addresses nobody has.

192.0.2.0/24 and 2001:db8::/32 are for documentation (RFC 5737, RFC 3849). The proxy answers a connection whose
original destination is a canary's with one line, CANARY_GREETING and the destination as HOST:PORT, and closes it.
Nothing else can have answered.

- A person's canary (`meshnet rules verify`, `up`) goes to CANARY_PORT, takes the way of any application, and has a
  record. The keeper's goes to PROOF_PORT, the same way, time and again, and has none.
- The sidecar's own goes to OWN_CANARY at PROOF_PORT: a rule ahead of all others catches it, for the sidecar's
  connections pass every other.
- An inbound one comes to INBOUND_CANARY, at a port that is captured, from a visitor that the prover has made; for so
  long the address is this host's. It has no record.
- Who asks for readiness at READINESS_PORT of this host's own address, where nobody listens, is an inbound canary by
  itself: a kubelet comes from elsewhere, again and again. It has an answer over HTTP, and no record.
"""

from typing import Final, Literal

from meshnet.model.address import Address

IpFamily = Literal["ipv4", "ipv6"]
FAMILIES: Final[tuple[IpFamily, ...]] = ("ipv4", "ipv6")

CANARY_PORT = 15122
PROOF_PORT = 15123
READINESS_PORT = 15124  # where meshnet inject has a kubelet ask; elsewhere what capture.readiness_port says
CANARY_V4 = "192.0.2.2"
CANARY_V6 = "2001:db8::2"
CANARY: Final[dict[IpFamily, str]] = {"ipv4": CANARY_V4, "ipv6": CANARY_V6}
OWN_CANARY: Final[dict[IpFamily, str]] = {"ipv4": "192.0.2.3", "ipv6": "2001:db8::3"}
INBOUND_CANARY: Final[dict[IpFamily, str]] = {"ipv4": "192.0.2.9", "ipv6": "2001:db8::9"}
CANARY_GREETING = b"meshnet-canary "

_PROOFS = frozenset(Address(host, PROOF_PORT) for host in (*CANARY.values(), *OWN_CANARY.values()))
_PERSONS = frozenset(Address(host, CANARY_PORT) for host in CANARY.values())


def is_canary(destination: Address) -> bool:
    """Whether a captured connection is a person's canary."""
    return destination in _PERSONS


def is_proof(destination: Address) -> bool:
    """Whether it is one of those that come time and again, and that nobody wants to see."""
    return destination in _PROOFS


def is_inbound_canary(destination: Address) -> bool:
    """Whether what the inbound proxy got is a canary."""
    return destination.host in INBOUND_CANARY.values()


def greeting(destination: Address) -> bytes:
    """What the proxy answers a canary."""
    return CANARY_GREETING + str(destination).encode() + b"\n"
