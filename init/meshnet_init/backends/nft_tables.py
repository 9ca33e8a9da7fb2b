"""What the kernel holds in nftables, iptables-nft's tables included: read by netlink, without binaries."""

import errno
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nftsocket import (
    NFPROTO_INET,
    NFT_MSG_GETCHAIN,
    NFT_MSG_GETTABLE,
    NFTSocket,
    nft_chain_msg,
    nft_table_msg,
)

from meshnet.errors import CommandError
from meshnet_init.backends import not_permitted

NF_ACCEPT = 1
_DORMANT = 1  # NFT_TABLE_F_DORMANT
_REFUSING = "MESHNET_GUARD_"
_FAMILIES = {1: "inet", 2: "ip", 10: "ip6"}  # NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6

Message = Any  # pyroute2's messages are dictionaries without types


class NftChain(NamedTuple):
    """`priority` of its hook, 0 where it has none; `accepts` what comes to its end."""

    name: str
    priority: int
    accepts: bool


def nft_chains(family: int, table: str) -> list[NftChain]:
    """The chains in one table, iptables-nft's included. Raises CommandError."""
    found = []
    for message in dump(nft_chain_msg, NFT_MSG_GETCHAIN, family, []):
        if message.get_attr("NFTA_CHAIN_TABLE") == table:
            hook, policy = message.get_attr("NFTA_CHAIN_HOOK"), message.get_attr("NFTA_CHAIN_POLICY")
            priority = hook.get_attr("NFTA_HOOK_PRIORITY") if hook else 0
            found.append(NftChain(message.get_attr("NFTA_CHAIN_NAME"), priority, policy in (None, NF_ACCEPT)))
    return found


def dump(shape: type[Any], kind: int, family: int, attributes: list[tuple[str, object]]) -> list[Message]:
    query = shape()
    query["attrs"] = attributes
    try:
        with NFTSocket(nfgen_family=family) as netlink:  # type: ignore[no-untyped-call]  # pyroute2 has no types
            return list(netlink.request_get(query, kind))
    except NetlinkError as error:
        if error.code == errno.EPERM:
            raise not_permitted("read") from error
        if error.code in (errno.ENOENT, errno.EINVAL, errno.EOPNOTSUPP):  # no such table, or a kernel without nftables
            return []
        raise CommandError(
            "cannot read the kernel's nftables rules",
            why=os.strerror(error.code),
            fix="try it by hand: nft list ruleset",
        ) from error
    except OSError as error:
        if error.errno == errno.EPROTONOSUPPORT:  # a kernel without nfnetlink holds no rules
            return []
        raise


def made_later(table: str) -> Iterator[str]:
    """The chains of others that are asked before the table's, in words.

    They are of equal type and priority, in a table that came later.

    Of the hooks of one priority the kernel asks the one first that was registered last (nf_hook_entries_grow). A chain
    that was added to an older table is not told from one that was always there. Who only refuses may come at any time.
    """
    places, others = {}, []
    for family in _FAMILIES:
        for message in dump(nft_chain_msg, NFT_MSG_GETCHAIN, family, []):
            hook = message.get_attr("NFTA_CHAIN_HOOK")
            if not hook or not message.get_attr("NFTA_CHAIN_USE"):
                continue  # nobody comes to it, or it has no rules
            number, priority = hook.get_attr("NFTA_HOOK_HOOKNUM"), hook.get_attr("NFTA_HOOK_PRIORITY")
            place = message.get_attr("NFTA_CHAIN_TYPE"), number, priority
            chain, of = message.get_attr("NFTA_CHAIN_NAME"), message.get_attr("NFTA_CHAIN_TABLE")
            if (family, of) != (NFPROTO_INET, table):
                others.append((family, of, chain, place))
            elif not chain.startswith(_REFUSING):
                places[place] = chain
    rivals = [(family, of, chain, places[place]) for family, of, chain, place in others if place in places]
    made = _handles() if rivals else {}
    for family, of, chain, ours in rivals:
        if made.get((family, of), 0) > made.get((NFPROTO_INET, table), 0):
            yield f"ahead of {ours}: chain {chain} of table {_FAMILIES[family]} {of}, which was made later"


def _handles() -> dict[tuple[int, str], int]:
    """Of each table whose chains are asked, by family and name: they count up as tables are made."""
    return {
        (family, message.get_attr("NFTA_TABLE_NAME")): message.get_attr("NFTA_TABLE_HANDLE") or 0
        for family in _FAMILIES
        for message in dump(nft_table_msg, NFT_MSG_GETTABLE, family, [])
        if not (message.get_attr("NFTA_TABLE_FLAGS") or 0) & _DORMANT
    }
