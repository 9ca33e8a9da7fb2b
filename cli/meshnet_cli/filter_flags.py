"""The filters of `meshnet conns` as flags: which there are, how they are read, and what they make together."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from meshnet_cli import filters
from meshnet_cli.filters import Filter, Predicate
from meshnet_cli.output import Parsed, parse_size


@dataclass(frozen=True, slots=True)
class Flag:
    """One filter: a flag that takes a value (`make`) or stands for itself (`holds`). Flags of a group are OR."""

    name: str
    help: str
    make: Callable[[str], Predicate] | None = None
    metavar: str = ""
    holds: Predicate | None = None
    group: str = ""


_WHO = "NAME|IP|CIDR|SPIFFE"
FLAGS = (
    Flag("from", "Who opened it.", filters.client, _WHO),
    Flag("to", "Where it went.", filters.server, _WHO),
    Flag("peer", "Either of the two.", filters.peer, _WHO),
    Flag("service", "The service called, with or without its port.", filters.service, "NAME"),
    Flag("port", "The port called.", filters.port, "PORT"),
    Flag("dir", "Into this host or out of it.", filters.direction, "in|out"),
    Flag("state", "As in the STATE column.", filters.state, "STATE"),
    Flag("open", "Not ended.", holds=filters.is_open, group="state"),
    Flag("failed", "Refused, denied or failed.", holds=filters.is_failed, group="state"),
    Flag("tls", "How the leg between the hosts is protected.", filters.tls, "mtls|plain|none"),
    Flag("plain", "The same as --tls plain.", holds=filters.is_plain, group="tls"),
    Flag("identity", "The SPIFFE id of either side; * is a wildcard.", filters.identity, "GLOB"),
    Flag("policy", "The policy that allowed or denied it.", filters.policy, "GLOB"),
    Flag("reason", "Why it ended, such as breaker.open or 'connect.*'.", filters.reason, "CODE|GLOB"),
    Flag("min-age", "At least this old.", filters.min_age, "DURATION"),
    Flag("min-bytes", "At least this much, both ways together.", lambda t: filters.min_bytes(parse_size(t)), "SIZE"),
)
_NAMES = frozenset(flag.name for flag in FLAGS)


class FilterCommand(click.Command):
    """Reads `--not --to db` as `--not-to db`, so that click does the rest."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _joined_not(args, ctx))


def _joined_not(args: Sequence[str], ctx: click.Context) -> list[str]:
    joined: list[str] = []
    rest = iter(args)
    for arg in rest:
        if arg == "--not":
            inverted = next(rest, "")
            if inverted.removeprefix("--").partition("=")[0] not in _NAMES:
                raise click.UsageError("--not stands before the filter it inverts, as in: --not --to db", ctx)
            arg = "--not-" + inverted.removeprefix("--")
        joined.append(arg)
    return joined


def filter_options(command: Any) -> Any:
    """Every flag of FLAGS, and its hidden inverse. The command gets them as keyword arguments."""
    command = click.option(
        "--not", is_flag=True, expose_value=False, help="Inverts the next filter, as in: --not --to db."
    )(command)
    for flag in reversed(FLAGS):
        for prefix, hidden in (("not-", True), ("", False)):
            name = f"--{prefix}{flag.name}"
            if flag.make is None:
                option = click.option(name, is_flag=True, hidden=hidden, help=flag.help)
            else:
                kind = Parsed(flag.name, flag.make)
                option = click.option(
                    name, type=kind, multiple=True, metavar=flag.metavar, hidden=hidden, help=flag.help
                )
            command = option(command)
    return command


def chosen_filter(flags: dict[str, Any]) -> Filter:
    """`flags`: what click read, by parameter name; a tuple of predicates, or True for a flag without a value."""
    wanted: dict[str, list[Predicate]] = {}
    unwanted: list[Predicate] = []
    for flag in FLAGS:
        name = flag.name.replace("-", "_")
        given = _predicates(flag, flags[name])
        if given:
            wanted.setdefault(flag.group or flag.name, []).extend(given)
        unwanted.extend(_predicates(flag, flags[f"not_{name}"]))
    return Filter(tuple(map(tuple, wanted.values())), tuple(unwanted))


def _predicates(flag: Flag, value: Any) -> Iterable[Predicate]:
    if flag.holds is None:
        return value  # type: ignore[no-any-return]  # click's: a tuple of what Flag.make returned
    return [flag.holds] if value else []
