"""`meshnet explain`: one connection step by step, and what to do about it."""

import re
import shlex
from collections.abc import Iterator, Sequence

import click
import msgspec

from meshnet.errors import CommandError, Reason
from meshnet.model.admin import ConnectionList, ExplainConnection, ExplainRoute, ListConnections, RouteView
from meshnet.model.connection import Connection, Direction, Security, Shape
from meshnet_cli.client import EXIT_FAILED, admin_options, ask
from meshnet_cli.columns import TABLE, client_name, direction_name, print_connections, service_name, tls_name
from meshnet_cli.explain_capture import RuleStep, capturing_rule, explain_capture, is_address
from meshnet_cli.explain_lines import capture_lines, route_lines, rule_words
from meshnet_cli.here import TcpView
from meshnet_cli.legs import endpoint_legs
from meshnet_cli.output import age, milliseconds, output_options, print_as, printable, size
from meshnet_cli.reasons import ADVICE

_MOST_ENDPOINTS = 10  # of a service, beside what has happened to a connection


class ReasonExplanation(Shape, frozen=True):
    code: str
    cause: str
    cure: str
    api_version: str = "meshnet.dev/v1"
    kind: str = "ReasonExplanation"


class Explanation(Connection, frozen=True, kw_only=True):
    """The connection, and what its reason code means; both texts are empty while it is open.

    `route` is where an outbound one to a service would go if it began now, with the best of the endpoints.

    `rule` is the one that would capture it now; none for who may not read rules, and of what comes through a tunnel.

    `tcp` is what the kernel knows of an open one, if it was asked on the sidecar's own host.

    `others` have the same id. A client's sidecar gives a connection its id on both hosts: the same again when it tries
    another endpoint of one host, and a hostile one gives any.
    """

    cause: str = ""
    cure: str = ""
    tcp: TcpView | None = None
    route: RouteView | None = None
    rule: RuleStep | None = None
    others: tuple[Connection, ...] = ()
    api_version: str = "meshnet.dev/v1"
    kind: str = "Explanation"


@click.command(
    epilog="\b\nExamples:\n  meshnet explain k802\n  meshnet explain $(meshnet conns --failed --top 1 -o name)\n"
    "  meshnet explain breaker.open\n  sudo meshnet explain 10.96.0.10:8080\n"
    "  sudo meshnet explain api:8080\n  sudo meshnet explain 10.0.0.7 10.0.0.1:5432",
)
@click.argument("what", nargs=-1, required=True, metavar="ID | REASON | [FROM] HOST:PORT")
@output_options
@admin_options
def command(*, what: tuple[str, ...], output: str, socket_path: str, timeout: float) -> None:
    """One connection step by step, and what to do about it.

    ID is as `meshnet conns` shows it; it is the same on both hosts. The steps tell which endpoints were weighed, as
    they were then. The rule that captures it, told to who may read rules, and the endpoints below the steps are those
    of now.

    With a REASON code, as breaker.open: what it means, and what to do about it.

    With HOST:PORT, or a service with its port, instead: whether a connection to there would be captured, by which rule,
    or why not; and where it would go then: the service, its endpoints in order of preference, and why some are passed
    over. It comes FROM this host unless you say so, or it goes to this host: then the sidecar says of a caller that you
    name whether policy lets it in. The kernel's rules are read for that, ours and those of other programs, which takes
    the right to.
    """
    id, *more = what
    if not more and id in set(Reason):
        _print_reason(Reason(id), output)
        return
    if more or ":" in id:
        if len(what) > 2:
            raise click.UsageError("at most FROM and HOST:PORT")
        found = explain_capture("" if not more else id, what[-1], socket_path, timeout)
        text = "\n".join(map(printable, capture_lines(found)))
        print_as(output, found, [found], name=lambda it: it.target, table=lambda: click.echo(text))
        return
    if is_address(id):
        raise CommandError(f"{id} is an address without a port", fix=f"meshnet explain {id}:80", code=2)
    try:
        connection = ask(socket_path, ExplainConnection(id=id), Connection, timeout=timeout)
    except CommandError as error:
        if error.code == EXIT_FAILED:
            error.why = (
                error.why or "it never was here, or it ended so long ago that it is forgotten (admin.memory_mib)"
            )
        error.fix = error.fix or "meshnet conns --all -o name lists every connection the sidecar remembers"
        raise
    known = ask(socket_path, ListConnections(id=id), ConnectionList, timeout=timeout).items
    route, rule = _route(connection, socket_path, timeout), _rule(connection)
    explanation = _explained(connection, others=_others(connection, known), route=route, rule=rule)

    def table() -> None:
        click.echo("\n".join(map(printable, _lines(explanation))))
        if explanation.others:
            click.echo("\nThis id was given to others as well; a client's sidecar chooses what it gives:")
            print_connections(explanation.others, TABLE)

    print_as(output, explanation, [explanation], name=lambda it: it.id, table=table)


def _print_reason(code: Reason, output: str) -> None:
    found = ReasonExplanation(code, *ADVICE[code])

    def table() -> None:
        click.echo(f"{'reason':<11} {found.code}\n{'cause':<11} {found.cause}\n{'what to do':<11} {found.cure}")

    print_as(output, found, [found], name=lambda it: it.code, table=table)


def _others(connection: Connection, known: Sequence[Connection]) -> tuple[Connection, ...]:
    """Those with its id but for itself: the one that began as it did, whatever has happened to it since."""
    same = [other for other in known if other.id == connection.id]
    itself = next((at for at, other in enumerate(same) if _begin(other) == _begin(connection)), len(same))
    return tuple(same[:itself] + same[itself + 1 :])


def _route(connection: Connection, socket_path: str, timeout: float) -> RouteView | None:
    if connection.direction != Direction.OUTBOUND or not connection.destination.service:
        return None
    try:
        found = ask(socket_path, ExplainRoute(target=connection.original_destination), RouteView, timeout=timeout)
    except CommandError:  # it ends in this moment, or is of a version that cannot say
        return None
    more = max(0, len(found.candidates) - _MOST_ENDPOINTS)
    return msgspec.structs.replace(found, candidates=found.candidates[:_MOST_ENDPOINTS], more=found.more + more)


def _rule(connection: Connection) -> RuleStep | None:
    """What comes through a tunnel is captured by none: the sidecar listens for it."""
    if not connection.original_destination or (
        connection.direction == Direction.INBOUND and connection.tls.mode is Security.MTLS
    ):
        return None
    return capturing_rule(connection.source.address.rpartition(":")[0], connection.original_destination)


def _begin(connection: Connection) -> tuple[str, ...]:
    return connection.direction, connection.opened_at, connection.source.address


def _explained(connection: Connection, **more: object) -> Explanation:
    """With `more` of its fields."""
    fields = msgspec.structs.asdict(connection) | more
    if connection.reason is None:
        (leg,) = endpoint_legs([connection])
        return Explanation(**fields, tcp=TcpView.of(leg) if leg else None)
    advice = ADVICE[connection.reason.code]
    own = {"SERVICE": shlex.quote(connection.destination.service or "SERVICE"), "ID": shlex.quote(connection.id)}
    cure = re.sub(r"\b(SERVICE|ID)\b", lambda match: own[match[1]], advice.cure)
    return Explanation(**fields, cause=advice.cause, cure=cure)


def _lines(it: Explanation) -> Iterator[str]:
    reason = it.reason
    ends = f"{client_name(it)} -> {service_name(it)}"
    yield _joined(it.id, direction_name(it), ends, it.state, reason.code if reason else "")
    yield ""
    for number, step in enumerate(it.trace, 1):
        yield f"{number:>3}  {step}"
    if it.trace:
        yield ""
    for label, text in _facts(it):
        if text:
            yield f"{label:<11} {text}"
    if it.route is not None:
        yield ""
        yield "If it began now:"
        yield from route_lines(it.route)
    if reason is not None and reason.code is not Reason.OK:
        yield ""
        yield f"{'reason':<11} " + ": ".join(filter(None, (reason.code, reason.message)))
        yield f"{'ended':<11} " + (f"by {reason.ended_by}, " if reason.ended_by else "") + f"in phase {reason.phase}"
        yield f"{'cause':<11} {it.cause}"
        yield f"{'what to do':<11} {it.cure}"


def _facts(it: Explanation) -> Iterator[tuple[str, str]]:
    """What the steps do not say in one place; an empty text is not shown."""
    yield "client", _joined(it.source.address, it.source.identity)
    yield "rule", rule_words(it.rule) if it.rule else ""
    yield "service", _joined(it.destination.service, it.original_destination)
    yield "endpoint", _joined(it.endpoint, it.destination.identity, tls_name(it) if it.endpoint else "")
    yield "leg", _leg(it)
    yield "policy", it.policy
    yield "bytes", f"{size(it.bytes_sent)} sent, {size(it.bytes_received)} received by the client"
    lasted = milliseconds(it.duration_ms) if it.duration_ms < 1000 else age(it.duration_ms / 1000)
    yield "time", _joined(f"{lasted} from {it.opened_at}", it.closed_at and f"to {it.closed_at}")


def _leg(it: Explanation) -> str:
    if it.leg_port is None:
        return ""
    tcp = it.tcp
    found = f"round trip {milliseconds(tcp.rtt_us / 1000)}, {tcp.retransmits} retransmits" if tcp else ""
    return _joined(f"from our port {it.leg_port}", found)


def _joined(*parts: str) -> str:
    return "  ".join(filter(None, parts))
