"""WHICH KINDS OF RULE A KERNEL IS ASKED FOR: one rule of the plan's own stands for all of its kind. Pure.

A kind is told by its table, its family and its parts: what a backend makes the rule of, and a kernel may lack.
"""

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

import msgspec

from meshnet_init.rule import PLACES, Rule


class Kind(NamedTuple):
    """`table` is that of iptables, `chain` its type in nftables."""

    table: str
    chain: str
    family: str
    parts: frozenset[str]


class Answer(NamedTuple):
    """What the kernel has said of something that is made of these parts: why it does not take it, or nothing."""

    parts: Collection[str]
    said: str = ""


def samples(rules: Iterable[Rule], parts_of: Callable[[Rule], Collection[str]]) -> tuple[Rule, ...]:
    """The first rule of each kind, in order."""
    found: dict[Kind, Rule] = {}
    for rule in rules:
        found.setdefault(_kind(rule, parts_of), _anybodys(rule))
    return tuple(found.values())


def kinds(rules: Iterable[Rule], parts_of: Callable[[Rule], Collection[str]]) -> frozenset[Kind]:
    """Those that the rules are of."""
    return frozenset(_kind(rule, parts_of) for rule in rules)


def lacking(answers: Collection[Answer]) -> Answer | None:
    """The parts that the kernel lacks: those of what it refused, but for those of what it took."""
    taken = frozenset(part for answer in answers if not answer.said for part in answer.parts)
    refused = [answer for answer in answers if answer.said]
    if not refused:
        return None
    parts = {part for answer in refused for part in (frozenset(answer.parts) - taken or answer.parts)}
    return Answer(sorted(parts), refused[0].said)


def _kind(rule: Rule, parts_of: Callable[[Rule], Collection[str]]) -> Kind:
    place = PLACES[rule.chain]
    return Kind(place.table, place.kind, rule.family, frozenset(parts_of(rule)))


def _anybodys(rule: Rule) -> Rule:
    """By root's group in the place of any id: a kernel that can match one can match the other, and refuses an id that
    is not mapped. Where a rule is tried that group is the only one that always is.
    """
    owned = rule.uid is not None or rule.gid is not None
    return msgspec.structs.replace(rule, why="", uid=None, gid=0 if owned else None)
