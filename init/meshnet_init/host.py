"""What this network namespace is: the facts a plan depends on, and the connections that a removal waits for."""

import os
from collections.abc import Collection
from pathlib import Path

from meshnet_init.plan import Host

# /proc/net follows the main thread's namespace, this one the caller's.
_PROC_NET = Path("/proc/thread-self/net")
_IPV6_OFF = Path("/proc/sys/net/ipv6/conf/all/disable_ipv6")
_UID_MAP = Path("/proc/self/uid_map")
_GID_MAP = Path("/proc/self/gid_map")
ACCEPTS_MARKS = Path("/proc/sys/net/ipv4/tcp_fwmark_accept")
_CAP_NET_ADMIN, _CAP_NET_RAW = 12, 13  # linux/capability.h

# net/tcp_states.h: TIME_WAIT, CLOSE and LISTEN carry nothing that could be cut.
_NOT_OPEN = frozenset({"06", "07", "0A"})


def host_facts() -> Host:
    """Reads them from /proc. IPv6 counts when the kernel has it and the namespace has not switched it off."""
    accepts = os.access(ACCEPTS_MARKS, os.W_OK, effective_ids=True)  # with the rights that we have, root or not
    return Host(ipv6=_has_ipv6(), uids=_mapped(_UID_MAP), gids=_mapped(_GID_MAP), accepts_marks=accepts)


def open_connections(ports: Collection[int]) -> int:
    """TCP sockets of this namespace whose local port is one of `ports`, listeners aside, half-closed ones included."""
    count = 0
    for name in ("tcp", "tcp6"):
        try:
            table = (_PROC_NET / name).read_text()
        except FileNotFoundError:  # a kernel without IPv6
            continue
        for line in table.splitlines()[1:]:
            _, local, _, state, _ = line.split(maxsplit=4)
            if state not in _NOT_OPEN and int(local.rpartition(":")[2], 16) in ports:
                count += 1
    return count


def may_change_rules() -> bool:
    """Whether this process has the capability NET_ADMIN."""
    return _has(_CAP_NET_ADMIN)


def may_see_legacy_rules() -> bool:
    """Whether this process has the capability NET_RAW: the legacy tables are read and written by a raw socket."""
    return _has(_CAP_NET_RAW)


def legacy_tables() -> list[str]:
    """Those that somebody has used in this network namespace, `ip nat` for one; empty where it may not be asked."""
    found = []
    for family in ("ip", "ip6"):
        try:
            found += [f"{family} {name}" for name in (_PROC_NET / f"{family}_tables_names").read_text().split()]
        except OSError:
            continue
    return found


def _has(capability: int) -> bool:
    status = Path("/proc/self/status").read_text()
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> capability & 1)


def _mapped(table: Path) -> tuple[range, ...]:
    runs = []
    for line in table.read_text().splitlines():
        inside, _, count = (int(field) for field in line.split())
        runs.append(range(inside, inside + count))
    return tuple(runs)


def _has_ipv6() -> bool:
    if not (_PROC_NET / "if_inet6").exists():
        return False
    # A global address means that IPv6 is in use, whatever the default for new interfaces says.
    scopes = (line.split()[3] for line in (_PROC_NET / "if_inet6").read_text().splitlines())
    return _IPV6_OFF.read_text().strip() == "0" or "00" in scopes
