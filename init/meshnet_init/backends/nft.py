"""The `nft` backend: netlink, no binaries. One table for IPv4 and IPv6, replaced whole in one transaction.

A batch is a single send to the kernel, which takes all of it or none (nf_tables.h of linux/netfilter; nft(8)).

A table can have an owner: the socket that made it. No other may change or delete it, `flush ruleset` passes it by, and
it goes when that socket closes (NFT_TABLE_F_OWNER, Linux 5.12).
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import msgspec
from pyroute2.netlink import NETLINK_NETFILTER, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, NLMSG_ERROR
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES, nfgen_msg
from pyroute2.netlink.nfnetlink.nftsocket import (
    NFPROTO_INET,
    NFT_MSG_DELCHAIN,
    NFT_MSG_DELTABLE,
    NFT_MSG_GETRULE,
    NFT_MSG_NEWCHAIN,
    NFT_MSG_NEWRULE,
    NFT_MSG_NEWTABLE,
    nft_chain_msg,
    nft_rule_msg,
    nft_table_msg,
)

from meshnet.errors import CommandError
from meshnet_init.backends import Counted, Installed, Lack, modprobe, not_permitted
from meshnet_init.backends.cgroups import without_missing
from meshnet_init.backends.nft_expressions import decode, encode, module_of, parts_of
from meshnet_init.backends.nft_tables import NF_ACCEPT, Message, dump, made_later, nft_chains
from meshnet_init.kind import Answer, lacking, samples
from meshnet_init.render import NFT_TABLE, chains_of
from meshnet_init.rule import CHAINS, NAT_CHAINS, PLACES, Hook, Plan, Rule, Table

_BATCH_BEGIN = 0x10
_BATCH_END = 0x11
_NLM_F_NONREC = 0x100  # delete only what is empty (linux/netlink.h)
_NFT_TABLE_F_OWNER = 2
_BEHIND = 6  # in priority: iptables' chains are 5 behind ours
_SO_SNDBUFFORCE = 32
_ANSWER_SIZE = 1 << 16
_HOOKS: dict[Hook, int] = {"PREROUTING": 0, "INPUT": 1, "FORWARD": 2, "OUTPUT": 3}  # NF_INET_PRE_ROUTING and on
_IPTABLES: dict[Table, dict[str, int]] = {
    "mangle": dict.fromkeys(("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"), -150),
    "nat": {"PREROUTING": -100, "INPUT": 100, "OUTPUT": -100, "POSTROUTING": 100},
    "filter": dict.fromkeys(("INPUT", "FORWARD", "OUTPUT"), 0),
}
"""The chains that iptables-nft makes in each table, and their priorities."""


class NftBackend:
    """A table of the family inet. With `owner`, a netlink socket, it is that socket's, and decides behind all others of
    ours: its chains are the last ones.
    """

    name = "nft"

    def __init__(self, table: str = NFT_TABLE, owner: socket.socket | None = None) -> None:
        self._name, self._owner = table, owner

    def unavailable(self, plan: Plan) -> Lack:
        """A table is made and deleted again in one transaction, so that no rule of it is ever asked."""
        lack = lacking(self._answers(samples(without_missing(plan).rules, parts_of)))
        if lack is None:
            return Lack()
        modules = sorted({module_of(part) for part in lack.parts})
        return Lack(f"the kernel's nftables has no {', '.join(lack.parts)}: {lack.said}", modprobe(modules))

    def _answers(self, rules: Sequence[Rule]) -> list[Answer]:
        """Of the table, of the chains if that was taken, and of the rules if those were."""
        plan, name = Plan(rules=tuple(rules)), f"{self._name}_probe"
        try:
            refused = _refused([*self._made(name, plan), _table(NFT_MSG_DELTABLE, 0, name)], self._owner)
        except OSError as error:  # a kernel without nfnetlink
            refused = {0: error.errno or errno.EIO}
        if errno.EPERM in refused.values():
            raise not_permitted("change")
        said = {number: os.strerror(code) for number, code in refused.items()}
        whole = said.get(0) or said.get(1, "")  # all of it: by a kernel with nfnetlink and without nf_tables
        table = Answer(["table" if self._owner is None else "table with an owner"], whole)
        chains = [
            Answer([f"chain {PLACES[chain].kind}"], said.get(number, ""))
            for number, chain in enumerate(chains_of(plan), start=2)
        ]
        if any(answer.said for answer in (table, *chains)):
            return [table] if table.said else [table, *chains]
        first = 2 + len(chains)
        return [
            table,
            *chains,
            *(Answer(parts_of(rule), said.get(at, "")) for at, rule in enumerate(plan.rules, first)),
        ]

    def installed(self) -> Installed | None:
        chains = {chain.name for chain in nft_chains(NFPROTO_INET, self._name)}
        if not chains:
            return None
        rules, problems = [], []
        for message in dump(nft_rule_msg, NFT_MSG_GETRULE, NFPROTO_INET, [("NFTA_RULE_TABLE", self._name)]):
            if message.get_attr("NFTA_RULE_TABLE") != self._name:
                continue
            chain = message.get_attr("NFTA_RULE_CHAIN")
            counted = decode(chain, message.get_attr("NFTA_RULE_EXPRESSIONS") or ()) if chain in CHAINS else None
            if counted is not None:
                why = message.get_attr("NFTA_RULE_USERDATA") or ""
                rules.append(msgspec.structs.replace(counted, rule=msgspec.structs.replace(counted.rule, why=why)))
            else:
                problems.append(f"a rule in {chain} that is not meshnet's (nft list table inet {self._name})")
        problems += [f"chain {chain} is missing" for chain in NAT_CHAINS if chain not in chains]
        if self._owner is None:
            problems += made_later(self._name)
        return Installed(
            backend=self.name, rules=tuple(sorted(rules, key=_chain_order)), ipv6=True, problems=tuple(problems)
        )

    def expected(self, plan: Plan) -> tuple[Rule, ...]:
        return tuple(sorted(without_missing(plan).rules, key=lambda rule: CHAINS.index(rule.chain)))

    def apply(self, plan: Plan) -> None:
        self._write(without_missing(plan))

    def delete(self) -> None:
        self._write(None)

    def sweep(self) -> None:
        """Nothing is left by a transaction that does not come to its end."""

    def _write(self, plan: Plan | None) -> None:
        # "add" first, so that the delete has something to delete: then the table is always made from nothing.
        anew = [_table(NFT_MSG_NEWTABLE, NLM_F_CREATE, self._name), _table(NFT_MSG_DELTABLE, 0, self._name)]
        try:
            _commit([*anew, *(self._made(self._name, plan) if plan else ())], self._owner)
        except OSError as error:
            if error.errno == errno.EPERM and self._owner is None:
                raise not_permitted("change") from error
            raise CommandError(
                "the kernel refused the nftables rules; what was in force still is",
                why=str(error.strerror),
                fix="try the other backend: meshnet init --backend iptables",
            ) from error

    def _made(self, name: str, plan: Plan) -> Iterator[Message]:
        flags, behind = (0, 0) if self._owner is None else (_NFT_TABLE_F_OWNER, _BEHIND)
        yield _table(NFT_MSG_NEWTABLE, NLM_F_CREATE, name, flags)
        for chain in chains_of(plan):
            place = PLACES[chain]
            hook = {
                "attrs": [("NFTA_HOOK_HOOKNUM", _HOOKS[place.hook]), ("NFTA_HOOK_PRIORITY", place.priority + behind)]
            }
            attributes = [
                ("NFTA_CHAIN_TABLE", name),
                ("NFTA_CHAIN_NAME", chain),
                ("NFTA_CHAIN_HOOK", hook),
                ("NFTA_CHAIN_POLICY", NF_ACCEPT),
                ("NFTA_CHAIN_TYPE", place.kind),
            ]
            yield _message(nft_chain_msg, NFT_MSG_NEWCHAIN, NLM_F_CREATE, attributes)
        for rule in plan.rules:
            attributes = [
                ("NFTA_RULE_TABLE", name),
                ("NFTA_RULE_CHAIN", rule.chain),
                ("NFTA_RULE_EXPRESSIONS", encode(rule)),
            ]
            if rule.why:
                attributes.append(("NFTA_RULE_USERDATA", rule.why))
            yield _message(nft_rule_msg, NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, attributes)


def drop_empty_iptables(family: int, table: Table) -> None:
    """Deletes what iptables-nft made in a table to hang our jumps on: built-in chains, the table, if now empty.

    iptables makes them again when it next needs them. A chain whose policy is to drop says something, though it is
    empty. `family` is NFPROTO_IPV4 or NFPROTO_IPV6.
    """
    for chain in nft_chains(family, table):
        if chain.priority == _IPTABLES[table].get(chain.name) and chain.accepts:
            attributes = [("NFTA_CHAIN_TABLE", table), ("NFTA_CHAIN_NAME", chain.name)]
            _delete_if_empty(_message(nft_chain_msg, NFT_MSG_DELCHAIN, _NLM_F_NONREC, attributes, family))
    _delete_if_empty(_message(nft_table_msg, NFT_MSG_DELTABLE, _NLM_F_NONREC, [("NFTA_TABLE_NAME", table)], family))


def nat_refused(family: int) -> str:
    """Why the kernel takes no chain of the type nat in this family, as iptables-nft's are; empty where it does. One is
    made, and deleted in the same transaction.
    """
    name = f"{NFT_TABLE}_probe"
    attributes = [
        ("NFTA_CHAIN_TABLE", name),
        ("NFTA_CHAIN_NAME", "OUTPUT"),
        ("NFTA_CHAIN_HOOK", {"attrs": [("NFTA_HOOK_HOOKNUM", _HOOKS["OUTPUT"]), ("NFTA_HOOK_PRIORITY", -100)]}),
        ("NFTA_CHAIN_TYPE", "nat"),
    ]
    of_table = [("NFTA_TABLE_NAME", name)]
    try:
        _commit(
            [
                _message(nft_table_msg, NFT_MSG_NEWTABLE, NLM_F_CREATE, of_table, family),
                _message(nft_chain_msg, NFT_MSG_NEWCHAIN, NLM_F_CREATE, attributes, family),
                _message(nft_table_msg, NFT_MSG_DELTABLE, 0, of_table, family),
            ]
        )
    except PermissionError as error:
        raise not_permitted("change") from error
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _delete_if_empty(message: Message) -> None:
    try:
        _commit([message])
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOENT):  # somebody's rules are in it, or there is no such table
            raise


def _table(kind: int, flags: int, name: str, table_flags: int = 0) -> Message:
    attributes: list[tuple[str, object]] = [("NFTA_TABLE_NAME", name)]
    if table_flags:
        attributes.append(("NFTA_TABLE_FLAGS", table_flags))
    return _message(nft_table_msg, kind, flags, attributes)


def _message(
    shape: type[Any], kind: int, flags: int, attributes: Sequence[tuple[str, object]], family: int = NFPROTO_INET
) -> Message:
    message = shape()
    message["nfgen_family"] = family
    message["attrs"] = attributes
    message["header"]["type"] = NFNL_SUBSYS_NFTABLES << 8 | kind
    message["header"]["flags"] = NLM_F_REQUEST | flags
    return message


def _commit(messages: Sequence[Message], owner: socket.socket | None = None) -> None:
    """Sends one transaction. Raises OSError with the kernel's first complaint; then nothing was changed."""
    for code in _refused(messages, owner).values():
        raise OSError(code, os.strerror(code))


def _refused(messages: Sequence[Message], owner: socket.socket | None = None) -> dict[int, int]:
    """Sends one transaction, by `owner` or a socket of its own. What the kernel refuses of it, each with its error: by
    their numbers, from 1 on, and 0 is all of it. Where there is anything nothing was changed.
    """
    # pyroute2's own batches wait for ever when the kernel refuses a batch as a whole: it then answers its begin only.
    data = b""
    for number, message in enumerate([_edge(_BATCH_BEGIN), *messages, _edge(_BATCH_END)]):
        message["header"]["sequence_number"] = number
        message.encode()
        data += message.data
    with netlink_socket() if owner is None else nullcontext(owner) as netlink:
        try:
            netlink.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, len(data))
        except PermissionError:  # root of a user namespace only
            netlink.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, len(data))
        netlink.sendto(data, (0, 0))
        # The kernel has done all of it by now. It answers what it refuses, and nothing else, as no ACK was asked for.
        complaints = list(_answers(netlink))
    found: dict[int, int] = {}
    for answer in complaints:
        kind, number, code = struct.unpack_from("=4xH2xI4xi", answer)  # struct nlmsghdr, struct nlmsgerr
        if kind == NLMSG_ERROR and code:
            found.setdefault(number, -code)
    return found


def netlink_socket() -> socket.socket:
    """One that may own a table of this network namespace. Raises OSError where the kernel has no nfnetlink."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)


def _answers(netlink: socket.socket) -> Iterator[bytes]:
    while True:
        try:
            yield netlink.recv(_ANSWER_SIZE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # more complaints than it could keep, behind the first
                raise


def _edge(kind: int) -> Message:
    message = nfgen_msg()  # type: ignore[no-untyped-call]  # pyroute2 has no types
    message["res_id"] = NFNL_SUBSYS_NFTABLES
    message["header"]["type"] = kind
    message["header"]["flags"] = NLM_F_REQUEST
    return message


def _chain_order(counted: Counted) -> int:
    return CHAINS.index(counted.rule.chain)
