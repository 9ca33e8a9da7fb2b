"""Where `meshnet rules verify` connects to find out whether the rules capture: addresses nobody has.

192.0.2.0/24 and 2001:db8::/32 are for documentation (RFC 5737, RFC 3849). The outbound proxy answers a connection whose
original destination is one of the two, at CANARY_PORT, with one line, CANARY_GREETING and the destination as HOST:PORT,
and closes it. Nothing else can have answered.
"""

from meshnet.model.address import Address

CANARY_PORT = 15122
CANARY_V4 = "192.0.2.2"
CANARY_V6 = "2001:db8::2"
CANARY_GREETING = b"meshnet-canary "


def is_canary(destination: Address) -> bool:
    """Whether a captured connection is a canary."""
    return destination.port == CANARY_PORT and destination.host in (CANARY_V4, CANARY_V6)
