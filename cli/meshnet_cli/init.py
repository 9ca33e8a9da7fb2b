"""`meshnet init`: puts the redirect rules into this network namespace's kernel, and takes them out."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
import msgspec

from meshnet.errors import CommandError, ConfigError
from meshnet.model.admin import Status
from meshnet.model.settings import Settings
from meshnet_cli.client import EXIT_PERMISSION
from meshnet_cli.configuration import config_option, read_settings
from meshnet_cli.output import (
    DURATION,
    Parsed,
    output_options,
    print_json,
    print_json_line,
    printable,
    warn,
    with_sudo,
)
from meshnet_cli.rules import asked_first, sidecar_lines, unproved
from meshnet_cli.vm import ssh

if TYPE_CHECKING:  # these reach for the kernel: --help must not wait for that
    from meshnet_init.apply import Applied
    from meshnet_init.verify import Verification

EXIT_ROLLED_BACK = 7
_ROLLBACK_DRAIN = 5.0  # seconds


class InitView(msgspec.Struct, frozen=True, rename="camel"):
    """What was put in, and the proof of it if one was asked for."""

    applied: "Applied"
    verification: "Verification | None" = None
    api_version: str = "meshnet.dev/v1"
    kind: str = "Init"


def _listed(check: Callable[[tuple[str, ...], str], object]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        parts = tuple(part.strip() for part in text.split(",") if part.strip())
        try:
            check(parts, "")
        except ConfigError as error:
            raise ValueError(str(error).removeprefix(": ")) from None
        return parts

    return parse


def _to_exclude(parse: Callable[[str], tuple[str, ...]]) -> Callable[[str], tuple[str, ...]]:
    """To leave everything alone is to have no rules."""

    def some(text: str) -> tuple[str, ...]:
        parts = parse(text)
        if "*" in parts:
            raise ValueError("'*' would leave all alone: name some, or put no rules in")
        return parts

    return some


def _ports(text: str) -> tuple[str, ...]:
    from meshnet_init.values import parse_ports

    return _listed(parse_ports)(text)


def _cidrs(text: str) -> tuple[str, ...]:
    from meshnet_init.values import parse_networks

    return _listed(parse_networks)(text)


def _ids(text: str) -> tuple[str, ...]:
    from meshnet_init.values import parse_ids

    return _listed(parse_ids)(text)


def _interfaces(text: str) -> tuple[str, ...]:
    from meshnet_init.values import parse_interfaces

    return _listed(parse_interfaces)(text)


def _all_or_interfaces(text: str) -> tuple[str, ...]:
    return ("*",) if text.strip() == "*" else _interfaces(text)


def _cgroups(text: str) -> tuple[str, ...]:
    from meshnet_init.values import parse_cgroups

    return _listed(parse_cgroups)(text)


def _mark(text: str) -> int:
    try:
        number = int(text, 0)
    except ValueError:
        raise ValueError(f"{text!r} is not a number; write 4096 or 0x1000") from None
    if not 0 < number < 2**32:
        raise ValueError(f"{text} is not a mark from 1 to 0xffffffff")
    return number


_PORT = click.IntRange(1, 65535)
_PORTS = Parsed("ports", _ports)
_CIDRS = Parsed("cidrs", _cidrs)
_SOME_PORTS = Parsed("ports", _to_exclude(_ports))
_SOME_CIDRS = Parsed("cidrs", _to_exclude(_cidrs))
_SOME_IDS = Parsed("ids", _ids)
_SOME_INTERFACES = Parsed("interfaces", _to_exclude(_interfaces))
_INTERFACES = Parsed("interfaces", _all_or_interfaces)
_CGROUPS = Parsed("cgroups", _cgroups)
_BACKEND = click.Choice(("auto", "nft", "iptables", "legacy"))
_UDP = click.Choice(("allow", "count", "reject"))

# Each flag is a setting: section, key, type, help.
FLAGS: tuple[tuple[str, str, Any, str], ...] = (
    ("proxy", "inbound_port", _PORT, "Where the proxy takes inbound connections."),
    ("proxy", "outbound_port", _PORT, "Where the proxy takes outbound connections."),
    ("capture", "inbound_mode", click.Choice(("redirect", "tproxy")), "How inbound connections come to the proxy."),
    ("capture", "original_source", click.BOOL, "Have applications see their clients' addresses."),
    ("capture", "truthful_connect", click.BOOL, "Hold an application's connect() until the endpoint is reached."),
    ("capture", "inbound_ports", _PORTS, "Inbound ports to capture: 80,8000-8100 or *."),
    ("capture", "exclude_inbound_ports", _SOME_PORTS, "Inbound ports to leave alone."),
    ("capture", "inbound_cidrs", _CIDRS, "Clients to capture: 10.0.0.0/8,fd00::/8 or *."),
    ("capture", "exclude_inbound_cidrs", _SOME_CIDRS, "Clients to leave alone."),
    ("capture", "inbound_interfaces", _INTERFACES, "Interfaces to capture inbound: eth0,ens* or *."),
    ("capture", "readiness_port", _PORT, "Where /readyz is answered only through the rules, as for a kubelet."),
    ("capture", "reroute_interfaces", _SOME_INTERFACES, "Bridges; what passes from there goes to the outbound proxy."),
    ("capture", "outbound_ports", _PORTS, "Outbound ports to capture."),
    ("capture", "exclude_outbound_ports", _SOME_PORTS, "Outbound ports to leave alone."),
    ("capture", "outbound_cidrs", _CIDRS, "Destinations to capture: 10.0.0.0/8,fd00::/8 or *."),
    ("capture", "exclude_outbound_cidrs", _SOME_CIDRS, "Destinations to leave alone."),
    ("capture", "loopback_ports", _SOME_PORTS, "Ports to capture also where this host calls itself."),
    ("capture", "outbound_uids", _SOME_IDS, "Users to capture, by number, and nobody else."),
    ("capture", "outbound_gids", _SOME_IDS, "Groups to capture, by number, and nobody else."),
    ("capture", "outbound_cgroups", _CGROUPS, "Cgroups to capture, and nobody else: system.slice/web.service."),
    ("capture", "exclude_uids", _SOME_IDS, "Users whose connections to leave alone, by number."),
    ("capture", "exclude_gids", _SOME_IDS, "Groups whose connections to leave alone, by number."),
    ("capture", "exclude_cgroups", _CGROUPS, "Cgroups whose connections to leave alone."),
    ("capture", "exclude_interfaces", _SOME_INTERFACES, "Interfaces to leave alone: docker0,veth*."),
    ("proxy", "mark", Parsed("mark", _mark), "The mark on the proxy's own packets."),
    ("capture", "gid", click.IntRange(1, 2**32 - 2), "The proxy's primary group; its connections are left alone."),
    ("proxy", "local_mark", Parsed("mark", _mark), "The mark on connections made in a client's name."),
    ("capture", "ipv6", click.Choice(("auto", "on", "off", "reject")), "Capture IPv6; auto: where this host has it."),
    ("capture", "drop_invalid", click.BOOL, "Drop what fits into no captured connection."),
    ("capture", "strict", click.BOOL, "Refuse what should have been redirected and was not."),
    ("capture", "quic", _UDP, "UDP 443, which passes beside the proxy: allow, count or reject."),
    ("capture", "udp", _UDP, "All other UDP."),
    ("capture", "exclude_udp_ports", _SOME_PORTS, "UDP ports that are never refused."),
    ("capture", "backend", _BACKEND, "What writes the rules; auto: the first that can do each kind."),
)


def capture_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags that stand for settings; the command gets what was given of them as `with_flags` wants it."""
    for section, key, kind, text in reversed(FLAGS):
        name = f"--{key.replace('_', '-')}"
        metavar: str | None = kind.name.upper() if isinstance(kind, Parsed) else "NUMBER"
        if isinstance(kind, click.Choice):
            metavar = None
        elif kind is click.BOOL:
            metavar = "true|false"
        command = click.option(name, f"{section}__{key}", type=kind, metavar=metavar, help=text)(command)
    return command


def with_flags(settings: Settings, flags: dict[str, Any]) -> Settings:
    """The settings with every given flag in the place of what file and environment say. Raises ConfigError."""
    for name, value in flags.items():
        if value is not None:
            section, _, key = name.partition("__")
            changed = msgspec.structs.replace(getattr(settings, section), **{key: value})
            settings = msgspec.structs.replace(settings, **{section: changed})
    proxy = settings.proxy
    ports = {
        "outbound": proxy.outbound_port,
        "inbound": proxy.inbound_port,
        "tunnel": proxy.tunnel_port,
        "health": settings.admin.health_port,
    } | ({"probes": settings.probes.port} if settings.probes.checks else {})
    if len(settings.listening_ports()) < len(ports):
        raise ConfigError(
            f"two of the sidecar's ports ({', '.join(ports)}) are the same: {', '.join(map(str, ports.values()))}",
            suggestion="give each its own port",
        )
    return settings


@click.group(
    "init",
    invoke_without_command=True,
    short_help="Put the redirect rules into the kernel, or take them out.",
    epilog="\b\nEvery flag is a setting too, in meshnet.toml and as MESHNET_CAPTURE__OUTBOUND_PORTS and the like.\n\n"
    "\b\nExamples:\n  meshnet init --dry-run\n  sudo meshnet init --exclude-inbound-ports 22 --verify\n"
    "  sudo meshnet init remove",
)
@config_option
@capture_flags
@click.option("--dry-run", is_flag=True, help="Print the rules; change nothing.")
@click.option(
    "--format",
    "form",
    type=click.Choice(("nft", "iptables", "json")),
    help="How --dry-run prints; without it as the --backend would take it, and for auto as nft would.",
)
@click.option("--verify", "prove", is_flag=True, help="Prove that the rules capture, or put the old state back.")
@ssh.risk_option
@output_options
@click.pass_context
def command(
    ctx: click.Context,
    /,
    config: str | None,
    dry_run: bool,
    form: str | None,
    prove: bool,
    accept_risk: tuple[str, ...],
    output: str,
    **flags: Any,
) -> None:
    """Put the rules that capture TCP into the kernel of this network namespace.

    Only new connections are captured: what is open stays open. A second run changes nothing. Either all rules are in
    force afterwards, or what was before.
    """
    if ctx.invoked_subcommand is not None:
        return
    settings = with_flags(read_settings(config), flags)
    if dry_run:
        print_plan(settings, form)
        return
    ssh.need_safe(settings, accept_risk, with_sudo())
    view, sidecar = _put_in(settings, prove)
    if output in {"json", "jsonl"}:
        (print_json if output == "json" else print_json_line)(view)
        return
    applied = view.applied
    families = "IPv4 and IPv6" if applied.ipv6 else "IPv4"
    what = "in force" if applied.changed else "in force already, nothing changed"
    click.echo(f"{applied.rules} rules for {families} {what} ({applied.backend})")
    for each in applied.warnings():
        warn(each)
    for each in applied.tried_here:
        click.echo(printable(each))
    for older in applied.replaced:
        click.echo(f"older rules of {older} taken out")
    for older in applied.kept:
        click.echo(
            f"older rules of {older} capture nothing new; `meshnet init` again when their connections have ended"
        )
    if view.verification is not None:
        for line in sidecar_lines(settings, sidecar, view.verification):
            click.echo(line)
        for canary in (*view.verification.canaries, *view.verification.inbound):
            click.echo(printable(f"{canary.direction} {canary.family}: {canary.status}: {canary.detail}"))
        if unproved(view.verification):
            click.echo(f"! {unproved(view.verification)}")
        for line in asked_first(view.verification):
            click.echo(f"! {printable(line)}")


@command.command("remove")
@click.option("--drain", type=DURATION, default="30s", show_default=True, help="How long to wait for open connections.")
@click.option(
    "--if-stopping",
    metavar="UNIT",
    help="Only if systemd stops this unit for good: not if it starts it again, nor when the machine goes down.",
)
@output_options
def remove_command(drain: float, if_stopping: str | None, output: str) -> None:
    """Take the rules out, whatever put them in.

    New connections go direct at once. Those that were captured are waited for, and cut only if they outlive --drain.
    When nothing is installed, nothing is done.
    """
    from meshnet_cli import preflight
    from meshnet_cli.vm import systemd

    if if_stopping and not systemd.is_ending(if_stopping):
        click.echo(f"{if_stopping} is to be there again: the rules stay", err=True)
        return
    from meshnet_init.remove import remove

    preflight.need_right()
    removed = remove(drain, lambda left: click.echo(f"waiting for {_connections(left)}", err=True))
    if output in {"json", "jsonl"}:
        (print_json if output == "json" else print_json_line)(removed)
        return
    click.echo(f"rules removed ({', '.join(removed.backends)})" if removed.backends else "no rules are installed")
    for each in removed.warnings():
        warn(each)
    if removed.cut:
        click.echo(f"{_connections(removed.cut)} outlived the wait and {'was' if removed.cut == 1 else 'were'} cut")


def _put_in(settings: Settings, prove: bool) -> "tuple[InitView, Status | None]":
    """Applies and, if asked to, proves, against the sidecar that runs if there is one.

    Raises CommandError with code 7 when it put the old state back.
    """
    from meshnet_cli import preflight
    from meshnet_init.apply import apply, installed_rules
    from meshnet_init.rollback import put_back
    from meshnet_init.verify import verify

    preflight.need_right()
    preflight.need_free_readiness_port(settings, running=True)
    sidecar = _running(settings) if prove else None
    if sidecar is not None:
        preflight.need_fit(settings, sidecar)
    before = installed_rules()
    applied = apply(settings)
    if not prove:
        return InitView(applied), sidecar
    result = verify(settings, sidecar)
    if result.ok:
        return InitView(applied, result), sidecar
    canaries = (*result.canaries, *result.inbound)
    lost = [f"{it.direction} {it.family}: {it.detail}" for it in canaries if it.status == "not captured"]
    why = "; ".join([*result.differences, *result.misfits, *lost])
    if not applied.changed:
        raise CommandError("the rules do not capture", why=why, fix="meshnet rules show; are older rules in the way?")
    put_back(before, _ROLLBACK_DRAIN)
    raise CommandError(
        "the rules did not capture; what was before is back",
        why=why,
        fix="look for other software's rules: nft list ruleset, iptables-save",
        code=EXIT_ROLLED_BACK,
    )


def _running(settings: Settings) -> Status | None:
    """The sidecar that can be asked. In a pod its socket may be another user's, and root has no right but NET_ADMIN."""
    from meshnet_cli import supervise

    try:
        return supervise.running(settings)
    except CommandError as error:
        if error.code != EXIT_PERMISSION:
            raise
        warn(f"nothing is compared with a sidecar: {error.what}")
        return None


def print_plan(settings: Settings, form: str | None = None) -> None:
    """As nft, iptables or json; without `form` for whatever the settings name to write the rules, which says so where
    that is not to be known without trying.
    """
    from meshnet_init.host import host_facts
    from meshnet_init.plan import make_plan
    from meshnet_init.render import iptables_text, nft_text

    plan = make_plan(settings, host_facts())
    if form is None and settings.capture.backend == "auto":
        click.echo("as nft would take them; sudo meshnet check tells which backend auto takes here", err=True)
    form = form or form_for(settings.capture.backend)
    if form == "nft":
        click.echo(nft_text(plan), nl=False)
    elif form == "json":
        print_json(plan)
    else:
        click.echo("# iptables-restore --noflush\n" + iptables_text(plan, "ipv4"), nl=False)
        if plan.ipv6:
            click.echo("# ip6tables-restore --noflush\n" + iptables_text(plan, "ipv6"), nl=False)


def form_for(backend: str) -> str:
    """How rules are printed that this backend would write."""
    return "iptables" if backend in ("iptables", "legacy") else "nft"


def _connections(count: int) -> str:
    return "1 connection" if count == 1 else f"{count} connections"
