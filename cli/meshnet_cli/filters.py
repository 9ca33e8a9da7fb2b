"""Which connections a person wants to see. Pure: a filter is a function of one Connection."""

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase

from meshnet.errors import Reason
from meshnet.model.address import Address, Network, parse_address, parse_network
from meshnet.model.connection import Connection, Direction, Peer, Security, State
from meshnet.model.duration import parse_duration
from meshnet.model.identity import short_name

Predicate = Callable[[Connection], bool]

BAD_ENDS = frozenset({State.REFUSED, State.DENIED, State.FAILED})
ENDS = BAD_ENDS | {State.CLOSED}


@dataclass(frozen=True, slots=True)
class Filter:
    """Of each group in `wanted` one member must hold, and nothing of `unwanted`; no group is empty."""

    wanted: tuple[tuple[Predicate, ...], ...] = ()
    unwanted: tuple[Predicate, ...] = ()

    def __call__(self, connection: Connection) -> bool:
        return all(any(holds(connection) for holds in group) for group in self.wanted) and not any(
            holds(connection) for holds in self.unwanted
        )


# Each function below makes a predicate out of what stands after a flag; ValueError carries the words to show.


def client(text: str) -> Predicate:
    matches = _who(text)
    return lambda connection: matches(connection.source, ())


def server(text: str) -> Predicate:
    matches = _who(text)
    return lambda connection: matches(connection.destination, (connection.endpoint, connection.original_destination))


def peer(text: str) -> Predicate:
    from_it, to_it = client(text), server(text)
    return lambda connection: from_it(connection) or to_it(connection)


def service(text: str) -> Predicate:
    return lambda connection: _names_service(text, connection.destination.service)


def port(text: str) -> Predicate:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise ValueError(f"{text!r} is not a port")
    wanted = int(text)
    return lambda connection: any(
        address is not None and address.port == wanted
        for address in map(
            _address, (connection.destination.address, connection.original_destination, connection.endpoint)
        )
    )


def direction(text: str) -> Predicate:
    wanted = {"in": Direction.INBOUND, "out": Direction.OUTBOUND}.get(text)
    if wanted is None:
        raise ValueError(f"{text!r} is not in or out")
    return lambda connection: connection.direction is wanted


def state(text: str) -> Predicate:
    wanted = State(_one_of(text, State))
    return lambda connection: connection.state is wanted


def is_open(connection: Connection) -> bool:
    return connection.state not in ENDS


def is_failed(connection: Connection) -> bool:
    return connection.state in BAD_ENDS


def tls(text: str) -> Predicate:
    wanted = Security(_one_of(text, Security))
    return lambda connection: connection.tls.mode is wanted


def is_plain(connection: Connection) -> bool:
    return connection.tls.mode is Security.PLAIN


def identity(text: str) -> Predicate:
    return lambda connection: any(
        name and fnmatchcase(name, text)
        for name in (connection.source.identity, connection.destination.identity, connection.tls.peer_identity)
    )


def policy(text: str) -> Predicate:
    return lambda connection: connection.policy != "" and fnmatchcase(connection.policy, text)


def reason(text: str) -> Predicate:
    """A code, or a glob over codes such as `connect.*`."""
    wanted = {code for code in Reason if fnmatchcase(code, text)}
    if not wanted:
        raise ValueError(f"{text!r} is not a reason; there are {', '.join(Reason)}")
    return lambda connection: connection.reason is not None and connection.reason.code in wanted


def min_age(text: str) -> Predicate:
    shortest = parse_duration(text) * 1000
    return lambda connection: connection.duration_ms >= shortest


def min_bytes(count: int) -> Predicate:
    return lambda connection: connection.bytes_sent + connection.bytes_received >= count


def since(seconds: float, now: str) -> Predicate:
    """Opened or ended in the last `seconds` before `now` (RFC 3339)."""
    earliest = moment(now, -seconds)

    def recent(connection: Connection) -> bool:
        last = _timestamp(connection.closed_at) or _timestamp(connection.opened_at)
        return last is not None and last >= earliest

    return recent


def _who(text: str) -> Callable[[Peer, tuple[str, ...]], bool]:
    """Matches a peer, and further addresses of it, by address, network, SPIFFE glob or name, whichever `text` is."""
    if "://" in text:
        return lambda peer, _: fnmatchcase(peer.identity, text)
    network = _network(text)
    if network is not None:
        return lambda peer, more: any(_lies_in(network, address) for address in (peer.address, *more))
    exact = _address(text)
    if exact is not None:
        return lambda peer, more: exact in map(_address, (peer.address, *more))
    return lambda peer, _: (
        _names_service(text, peer.service) or (peer.identity != "" and fnmatchcase(short_name(peer.identity), text))
    )


def _names_service(text: str, name: str) -> bool:
    """`api` and `api:8080` both name the service port `api:8080`."""
    return name != "" and (fnmatchcase(name, text) or fnmatchcase(name.rpartition(":")[0], text))


def _one_of(text: str, known: type[State] | type[Security]) -> str:
    if text not in list(known):
        raise ValueError(f"{text!r} is not one of {', '.join(known)}")
    return text


def _network(text: str) -> Network | None:
    """None for what does not look like a network; ValueError for one with host bits set."""
    try:
        return parse_network(text)
    except ValueError:
        if "/" in text:
            raise
        return None


def _lies_in(network: Network, text: str) -> bool:
    address = _address(text)
    try:
        return ipaddress.ip_address(address.host if address else text) in network
    except ValueError:
        return False


def _address(text: str) -> Address | None:
    try:
        return parse_address(text)
    except ValueError:
        return None


def moment(text: str, seconds: float = 0.0) -> float:
    """So many seconds after that one (RFC 3339), in seconds since the epoch."""
    return (_timestamp(text) or 0.0) + seconds


def _timestamp(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
