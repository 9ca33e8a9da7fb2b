"""How answers to a client's own address come back to this host: a routing rule by mark, and a table that says `here`.

The kernel holds all there is to know of it: whether switches of /proc/sys/net are part of it, and which of them were
switched on by us, is the protocol number of the routing rules. They stand as long as the switches do: until they are
deleted, or until the next boot.
"""

import errno
import socket
from pathlib import Path
from typing import Any

from pyroute2.iproute.linux import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from meshnet.errors import CommandError
from meshnet.net.addresses import LocalAddresses
from meshnet.net.sock_diag import ESTABLISHED, host_of, tcp_sockets
from meshnet_init.backends import not_permitted
from meshnet_init.host import ACCEPTS_MARKS
from meshnet_init.rule import Routing

TABLE = 6700
PRIORITY = 100  # of the routing rules: behind the table of this host's own addresses, before all others
# Protocol numbers of nobody else (rtnetlink.h). To the second is added a bit for each switch that was off before.
_BY_RULES, _BY_SWITCHES = 67, 72
# An accepted socket has its SYN's mark; a refusal has the mark of what it answers (kernel's ip-sysctl.rst).
_SWITCHES = (ACCEPTS_MARKS, *(Path(f"/proc/sys/net/{ip}/fwmark_reflect") for ip in ("ipv4", "ipv6")))
_RTN_LOCAL, _SCOPE_HOST = 2, 254
_LOOPBACK = 1  # the interface's index in any namespace


def installed_routing() -> Routing | None:
    """What stands here of it; None unless all of it does."""
    with IPRoute() as netlink:  # type: ignore[no-untyped-call]  # pyroute2 has types in part
        rules = _rules(netlink)
        complete = {rule["family"] for rule in rules} == set(_families())
        routed = all(netlink.get_routes(family=family, table=TABLE) for family in _families())
    if not complete or not routed:
        return None
    accepts = rules[0].get_attr("FRA_PROTOCOL") >= _BY_SWITCHES
    if accepts and not all(_is_on(switch) for switch in _SWITCHES):
        return None
    return Routing(mark=rules[0].get_attr("FRA_FWMARK"), accepts=accepts)


def connections_in_clients_names() -> int:
    """Open ones of the proxy's to applications here, whose answers come back by these routes. Raises OSError."""
    if installed_routing() is None:
        return 0
    with LocalAddresses() as addresses:
        open_ = (found for found in tcp_sockets() if found.state == ESTABLISHED)
        return sum(1 for found in open_ if host_of(found.local) not in addresses)


def routing_differences(wanted: Routing | None) -> list[str]:
    """How this host differs from it, in words; empty when it does not."""
    as_wanted = not _left() if wanted is None else installed_routing() == wanted
    if as_wanted:
        return []
    return [
        f"routes for answers in a client's name are left over (ip rule; ip route show table {TABLE})"
        if wanted is None
        else f"answers in a client's name do not find back: rule {PRIORITY} or table {TABLE} is not as planned"
    ]


def route(wanted: Routing | None) -> bool:
    """Makes this host have what is wanted. Whether anything was changed. Raises CommandError."""
    if not routing_differences(wanted):
        return False
    try:
        with IPRoute() as netlink:  # type: ignore[no-untyped-call]  # pyroute2 has types in part
            older = _rules(netlink)
            if wanted is None:
                _take_out(netlink, older)
            else:
                try:
                    _put_in(netlink, wanted, older)
                except (NetlinkError, OSError):
                    if not older:
                        _take_out(netlink, _rules(netlink))
                    raise
    except (NetlinkError, OSError) as error:
        code = error.code if isinstance(error, NetlinkError) else error.errno
        if code in (errno.EPERM, errno.EACCES, errno.EROFS):
            raise not_permitted("change") from error
        raise CommandError(
            "could not change the routes by which answers to clients come back to the proxy",
            why=str(error),
            fix=f"see what is there: ip rule; ip route show table {TABLE}; or set capture.original_source = false",
        ) from error
    return True


def _put_in(netlink: Any, wanted: Routing, older: list[Any]) -> None:
    protocol, ours = _BY_RULES, _switched_on_by_us(older)
    if wanted.accepts:
        ours |= {switch for switch in _SWITCHES if switch.exists() and not _is_on(switch)}
        protocol = _BY_SWITCHES + sum(1 << bit for bit, switch in enumerate(_SWITCHES) if switch in ours)
    for switch in ours:
        switch.write_text("1" if wanted.accepts else "0")
    for family in _families():
        scope = _SCOPE_HOST if family == socket.AF_INET else 0
        netlink.route("replace", family=family, table=TABLE, dst="default", type=_RTN_LOCAL, scope=scope, oif=_LOOPBACK)
        _rule(netlink, "add", family, wanted.mark, protocol)
    for rule in older:
        if (rule.get_attr("FRA_FWMARK"), rule.get_attr("FRA_PROTOCOL")) != (wanted.mark, protocol):
            _delete(netlink, rule)


def _take_out(netlink: Any, rules: list[Any]) -> None:
    for switch in _switched_on_by_us(rules):
        switch.write_text("0")
    for rule in rules:
        _delete(netlink, rule)
    for family in _families():
        netlink.flush_routes(family=family, table=TABLE)


def _delete(netlink: Any, rule: Any) -> None:
    _rule(netlink, "del", rule["family"], rule.get_attr("FRA_FWMARK"), rule.get_attr("FRA_PROTOCOL"))


def _rule(netlink: Any, command: str, family: int, mark: int, protocol: int) -> None:
    marked = {"fwmark": mark, "fwmask": mark}
    try:
        netlink.rule(command, family=family, table=TABLE, priority=PRIORITY, protocol=protocol, **marked)
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise


def _left() -> bool:
    """Whether part of it stands, which is as good as nothing."""
    with IPRoute() as netlink:  # type: ignore[no-untyped-call]  # pyroute2 has types in part
        return bool(_rules(netlink) or any(netlink.get_routes(family=family, table=TABLE) for family in _families()))


def _rules(netlink: Any) -> list[Any]:
    found = [rule for family in _families() for rule in netlink.get_rules(family=family)]
    ours = range(_BY_RULES, _BY_SWITCHES + (1 << len(_SWITCHES)))
    return [rule for rule in found if rule.get_attr("FRA_TABLE") == TABLE and rule.get_attr("FRA_PROTOCOL") in ours]


def _families() -> tuple[int, ...]:
    off = Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
    six = Path("/proc/thread-self/net/if_inet6").exists() and off.exists() and off.read_text().strip() == "0"
    return (socket.AF_INET, socket.AF_INET6) if six else (socket.AF_INET,)


def _switched_on_by_us(rules: list[Any]) -> set[Path]:
    bits = max([rule.get_attr("FRA_PROTOCOL") - _BY_SWITCHES for rule in rules], default=0)
    return {switch for bit, switch in enumerate(_SWITCHES) if bits > 0 and bits >> bit & 1}


def _is_on(switch: Path) -> bool:
    """One that is not there is nobody's concern: a kernel without IPv6."""
    return not switch.exists() or switch.read_text().strip() == "1"
