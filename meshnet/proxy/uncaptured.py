"""What does not come through the sidecar, each connection with why: `meshnet conns --uncaptured`."""

from collections.abc import Callable, Collection, Iterable, Mapping

import trio
from msgspec import structs

from meshnet.model.address import Address
from meshnet.model.connection import Direction
from meshnet.model.settings import Settings
from meshnet.model.uncaptured import UncapturedConnection, UncapturedList, Why
from meshnet.net.addresses import LocalAddresses
from meshnet.net.sock_diag import TcpInfo, TcpSocket, host_of, tcp_sockets_with_info
from meshnet.proxy.bypass import Beside, Bypass

_SECOND_LOOK = 0.2  # seconds; the kernel's list is not of one moment, so what does not come through is seen twice


async def list_uncaptured(
    settings: Settings, pids: Callable[[], Iterable[int]], older: Collection[TcpSocket] | None
) -> UncapturedList:
    """`older`: those from before capture; None: there is no capture yet, so all are. Raises OSError."""
    with LocalAddresses() as addresses:
        bypass = Bypass(settings, addresses, pids)
        found = await trio.to_thread.run_sync(bypass.beside)
        if not found:
            return UncapturedList()
        await trio.sleep(_SECOND_LOOK)
        still = {_key(each.socket) for each in await trio.to_thread.run_sync(bypass.beside)}
    infos = {_key(socket): info for socket, info in await trio.to_thread.run_sync(tcp_sockets_with_info)}
    known = None if older is None else set(map(_key, older))
    return UncapturedList(
        items=tuple(
            _told(each, _why(each, known, bypass.scope.not_judged), infos.get(_key(each.socket)))
            for each in found
            if _key(each.socket) in still
        )
    )


def _key(found: TcpSocket) -> TcpSocket:
    """The inode comes when a program accepts it; it is the same connection."""
    return found._replace(inode=0)


def _why(it: Beside, older: Collection[TcpSocket] | None, not_judged: Mapping[Direction, str]) -> tuple[Why, str]:
    """And by which setting, where that says it."""
    if it.leaves:
        return "excluded", it.leaves
    if it.direction in not_judged:
        return "unknown", not_judged[it.direction]
    return "opened-before" if older is None or _key(it.socket) in older else "bypassed", ""


def _told(it: Beside, why: tuple[Why, str], info: TcpInfo | None) -> UncapturedConnection:
    found = it.socket
    here, there = Address(host_of(found.local), found.local_port), Address(host_of(found.remote), found.remote_port)
    is_outbound = it.direction is Direction.OUTBOUND
    told = UncapturedConnection(
        direction=it.direction,
        client=str(here if is_outbound else there),
        server=str(there if is_outbound else here),
        why=why[0],
        setting=why[1],
        uid=found.uid,
        inode=found.inode,
    )
    if info is None:
        return told
    return structs.replace(
        told,
        rtt_us=info.rtt_us,
        rtt_var_us=info.rtt_var_us,
        retransmits=info.retransmits,
        bytes_sent=info.bytes_sent if is_outbound else info.bytes_received,
        bytes_received=info.bytes_received if is_outbound else info.bytes_sent,
    )
