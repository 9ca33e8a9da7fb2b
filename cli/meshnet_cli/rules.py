"""`meshnet rules`: the kernel's redirect rules as planned, as they are, and whether they work."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import click
import msgspec

from meshnet.errors import ConfigError
from meshnet.model.admin import Status
from meshnet.model.settings import Settings
from meshnet_cli import keep
from meshnet_cli.configuration import config_option, read_settings
from meshnet_cli.output import output_options, print_json, print_json_line, printable
from meshnet_cli.table import print_table

if TYPE_CHECKING:  # these reach for the kernel: --help must not wait for that
    from meshnet_init.backends import Counted
    from meshnet_init.rule import Rule
    from meshnet_init.verify import Verification

_MOST_SHOWN = 3  # rules of others
_COLORS = {"STATUS": {"captured": "green", "not captured": "red"}}


class RuleView(msgspec.Struct, frozen=True, rename="camel"):
    """`match` is in nft's words; `hits` counts connections since the rule was written, None where nothing counts."""

    chain: str
    family: str
    match: str
    action: str
    why: str
    hits: int | None = None
    number: int = 0  # in its chain, from 1; where iptables has chains apart, in that of its family


class RulesView(msgspec.Struct, frozen=True, rename="camel"):
    backend: str
    rules: tuple[RuleView, ...]
    draining: bool = False
    problems: tuple[str, ...] = ()
    api_version: str = "meshnet.dev/v1"
    kind: str = "Rules"


class RulesList(msgspec.Struct, frozen=True, rename="camel"):
    items: tuple[RulesView, ...]
    api_version: str = "meshnet.dev/v1"
    kind: str = "RulesList"


@click.group("rules", short_help="The kernel's redirect rules: plan, show, verify and keep.")
def command() -> None:
    """The kernel's redirect rules. `meshnet init` puts them in."""


@command.command("plan")
@config_option
@output_options
def plan_command(config: str | None, output: str) -> None:
    """The rules that the settings ask for, in order, each with its reason."""
    from meshnet_init.host import host_facts
    from meshnet_init.plan import make_plan

    plan = make_plan(read_settings(config), host_facts())
    view = RulesView(backend="", rules=tuple(_rule_view(rule) for rule in plan.rules))
    if not _printed_json(view, output):
        print_table(
            ("CHAIN", "FAMILY", "MATCH", "ACTION", "WHY"),
            [(rule.chain, rule.family, rule.match or "everything", rule.action, rule.why) for rule in view.rules],
        )


@command.command("show")
@config_option
@output_options
def show_command(config: str | None, output: str) -> None:
    """The rules in the kernel, read back from it, and how many connections each has matched."""
    view = installed_view(config)
    if _printed_json(view, output):
        return
    if not view.items:
        click.echo("no rules are installed")
    for item in view.items:
        about = ": draining, nothing new is captured" if item.draining else ""
        about = ": the same once more, where no flush reaches them" if item.backend == "keeper" else about
        click.echo(f"backend {item.backend}{about}")
        print_table(
            ("CHAIN", "NO", "FAMILY", "MATCH", "ACTION", "HITS", "WHY"),
            [
                (r.chain, str(r.number), r.family, r.match or "everything", r.action, str(r.hits), r.why)
                for r in item.rules
            ],
        )
        for problem in item.problems:
            click.echo(f"! {problem}")


@command.command("verify")
@config_option
@output_options
@click.pass_context
def verify_command(ctx: click.Context, config: str | None, output: str) -> None:
    """Whether the kernel holds the plan, whether it fits the sidecar that runs, and whether connections are captured.

    A canary is sent in each family and direction. What comes in is sent by a network namespace made for it, which takes
    CAP_SYS_ADMIN, or a host where anybody may make a user namespace; where a host firewall drops it nothing is claimed.
    Where no sidecar answers at admin.socket, this command catches canaries in its place. Exit code 1 if anything is
    amiss with the rules; that no sidecar runs yet is not.
    """
    from meshnet_cli import supervise
    from meshnet_init.verify import verify

    settings = read_settings(config)
    sidecar = supervise.running(settings)
    result = verify(settings, sidecar)
    if not _printed_json(result, output):
        click.echo(f"rules ({result.backend or 'none'}): {'as planned' if not result.differences else 'differ'}")
        for line in result.differences:
            click.echo(f"! {line}")
        for line in sidecar_lines(settings, sidecar, result):
            click.echo(line)
        for line in result.misfits:
            click.echo(f"! {printable(line)}")
        if result.canaries:
            print_table(
                ("DIRECTION", "FAMILY", "STATUS", "CANARY", "WHY"),
                [
                    (c.direction, c.family, c.status, c.destination or "-", c.detail)
                    for c in (*result.canaries, *result.inbound)
                ],
                colors=_COLORS,
            )
        if unproved(result):
            click.echo(f"! {unproved(result)}")
        for line in asked_first(result):
            click.echo(f"! {printable(line)}")
        if result.fix:
            click.echo(f"fix: {result.fix}")
    if not result.ok:
        ctx.exit(1)


command.add_command(keep.command)


def installed_view(config: str | None) -> RulesList:
    """What the kernel has, and what a keeper holds beside it. Raises as meshnet_init.apply.installed_rules."""
    from meshnet_init.apply import installed_rules
    from meshnet_init.keep.guard import held

    guard = held()
    reasons = reasons_of(config)
    return RulesList(
        tuple(
            RulesView(
                backend=installed.backend,
                rules=_numbered(
                    tuple(_counted_view(counted, reasons) for counted in installed.rules),
                    apart=installed.backend not in ("nft", "keeper"),
                ),
                draining=installed.draining(),
                problems=installed.problems,
            )
            for installed in (*installed_rules(), *([guard] if guard is not None else []))
        )
    )


def unproved(result: "Verification") -> str:
    """What to say of rules that are as they should be, but that no connection has come through; empty if one has."""
    if not result.ok or any(canary.status == "captured" for canary in result.canaries):
        return ""
    if any(canary.status == "no route" for canary in result.canaries):
        return "nothing outbound proved: no route out of this host (add a route, then: meshnet rules verify)"
    return "nothing outbound proved: " + "; ".join(f"{canary.family}: {canary.detail}" for canary in result.canaries)


def asked_first(result: "Verification") -> Iterator[str]:
    """What no canary can prove: for whom others' rules may decide before ours."""
    found = result.asked_first
    for other in found[:_MOST_SHOWN]:
        yield f"may be asked before ours: table {other.table}, {other.chain}, priority {other.priority}: {other.text}"
    if len(found) > _MOST_SHOWN:
        yield f"and {len(found) - _MOST_SHOWN} more: nft list ruleset, iptables-legacy-save"
    if found and result.backend != "nft":
        yield 'the rules of the backend nft are asked before all of iptables\': capture.backend = "nft"'


def sidecar_lines(settings: Settings, sidecar: Status | None, result: "Verification") -> Iterator[str]:
    """Against whom the rules were verified, and what it means if there is nobody."""
    if sidecar is None:
        yield f"sidecar: none answers at {settings.admin.socket}; nothing was compared with one"
    else:
        yield f"sidecar: pid {sidecar.pid}, which the rules {'fit' if result.sidecar == 'fits' else 'do not fit'}"
    if result.for_nobody():
        yield "! new connections that the rules capture are refused until a sidecar runs"


def _rule_view(rule: "Rule", why: str = "", hits: int | None = None) -> RuleView:
    from meshnet_init.render import action, matches

    # The family has its own column; a CIDR's match says it anyway.
    shown = rule if rule.source or rule.destination else msgspec.structs.replace(rule, family="any")
    return RuleView(rule.chain, rule.family, matches(shown), action(rule), rule.why or why, hits)


def _counted_view(counted: "Counted", reasons: "dict[Rule, str]") -> RuleView:
    from meshnet_init.backends import plain

    return _rule_view(counted.rule, reasons.get(plain(counted.rule), ""), counted.packets)


def _numbered(views: tuple[RuleView, ...], *, apart: bool) -> tuple[RuleView, ...]:
    """As `explain` counts them."""
    counts: Counter[tuple[str, str]] = Counter()
    found = []
    for view in views:
        key = (view.chain, view.family if apart else "")
        counts[key] += 1
        found.append(msgspec.structs.replace(view, number=counts[key]))
    return tuple(found)


def reasons_of(config: str | None) -> "dict[Rule, str]":
    """iptables rules carry no reason: take it from the plan where it has the same rule."""
    from meshnet_init.backends import plain
    from meshnet_init.host import host_facts
    from meshnet_init.plan import make_plan

    try:
        plan = make_plan(read_settings(config), host_facts())
    except ConfigError:  # what is in the kernel is to be seen all the same
        return {}
    rules: Iterable[Rule] = (*plan.of_family("ipv4"), *plan.of_family("ipv6"))
    return {plain(rule): rule.why for rule in rules}


def _printed_json(view: msgspec.Struct, output: str) -> bool:
    if output not in {"json", "jsonl"}:
        return False
    (print_json if output == "json" else print_json_line)(view)
    return True
