"""What an application is told whose connect() was held and whose endpoint could not be reached."""

from meshnet.errors import Reason

_NOT_REACHED = frozenset({Reason.CONNECT_TIMEOUT, Reason.CONNECT_UNREACHABLE})


def refused(reason: Reason | None) -> bool:
    """Whether ECONNREFUSED is the truth, as somebody said no; else EHOSTUNREACH, as nobody answered.

    No ICMP error makes connect() fail with ETIMEDOUT (net/ipv4/icmp.c, icmp_err_convert): time is up here, not there.
    """
    return reason not in _NOT_REACHED
