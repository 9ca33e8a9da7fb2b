"""The answers of several workers as the one that their parent gives. Pure."""

from collections.abc import Iterable, Sequence

from msgspec import structs

from meshnet.model.admin import (
    CertificateStatus,
    ConfigStatus,
    EndpointView,
    RelayStatus,
    Status,
    TunnelStatus,
    WorkerStatus,
)
from meshnet.model.connection import Connection, Direction

_BREAKERS = ("closed", "half-open", "open")  # the worst last
_CHECKS = ("", "passing", "panic", "failing")  # the same


def merge_connections(lists: Iterable[Sequence[Connection]]) -> tuple[Connection, ...]:
    """In the order of one process: those that have ended, as they did, then the open ones, as they began."""
    return tuple(
        sorted(
            (connection for listed in lists for connection in listed),
            key=lambda it: (it.reason is None, it.opened_at if it.reason is None else it.closed_at),
        )
    )


def choose(found: Sequence[Connection]) -> Connection | None:
    """Of those with one id: the one that got it here, else the newest; see Registry.find."""
    return max(found, key=lambda it: (it.direction is Direction.OUTBOUND, it.opened_at), default=None)


def merge_endpoints(lists: Iterable[Sequence[EndpointView]]) -> tuple[EndpointView, ...]:
    """Connections added up; the breaker as the worker sees it who sees the worst, and how many see that."""
    views: dict[tuple[str, str, str], list[EndpointView]] = {}
    for listed in lists:
        for view in listed:
            views.setdefault((view.service, view.endpoint, view.dns_name if not view.endpoint else ""), []).append(view)
    return tuple(map(_endpoint, views.values()))


def _endpoint(views: Sequence[EndpointView]) -> EndpointView:
    worst = max(
        views,
        key=lambda view: (
            _BREAKERS.index(view.breaker),
            max(view.open_for_seconds, view.ejected_for_seconds),
            view.failures,
        ),
    )
    return structs.replace(
        worst,
        connections=sum(view.connections for view in views),
        pending=sum(view.pending for view in views),
        last_error=worst.last_error or next((view.last_error for view in views if view.last_error), ""),
        workers=sum(view.breaker == worst.breaker for view in views),
        check=max((view.check for view in views), key=_CHECKS.index),
        check_error=next((view.check_error for view in views if view.check_error), ""),
        dns_problem=next((view.dns_problem for view in views if view.dns_problem), ""),
    )


def merge_status(parent: Status, workers: Sequence[WorkerStatus], answers: Sequence[Status]) -> Status:
    """`parent`: what is of the parent alone, such as pid, listeners, whether it drains and what it knows of capture.

    Totals are of the processes that run; metrics remember those that have died.
    """
    problems = [*parent.not_ready_because, *(problem for answer in answers for problem in answer.not_ready_because)]
    if parent.draining:
        problems = ["draining", *problems]
    else:
        problems += [f"worker {worker.number} {worker.problem}" for worker in workers if worker.problem]
    return structs.replace(
        parent,
        ready=not problems,
        not_ready_because=tuple(dict.fromkeys(problems)),
        open_connections=sum(answer.open_connections for answer in answers),
        opened_total=sum(answer.opened_total for answer in answers),
        failed_total=sum(answer.failed_total for answer in answers),
        certificate=_certificate([answer.certificate for answer in answers], parent.certificate),
        config=_config([answer.config for answer in answers], parent.config),
        relay=_relay([answer.relay for answer in answers]),
        tunnels=_tunnels(tunnel for answer in answers for tunnel in answer.tunnels),
        workers=tuple(workers),
    )


def _certificate(held: Sequence[CertificateStatus], none: CertificateStatus) -> CertificateStatus:
    """The one that troubles first."""
    return min(held, key=lambda it: (not it.problem, it.expires_in_seconds), default=none)


def _config(held: Sequence[ConfigStatus], none: ConfigStatus) -> ConfigStatus:
    """A refused one before any other, else the one that is furthest behind."""
    return min(held, key=lambda it: (not it.problem, it.version), default=none)


def _relay(held: Sequence[RelayStatus]) -> RelayStatus:
    """What each of them has."""
    missing = {name: why for relay in held for name, why in relay.not_in_use.items()}
    names = dict.fromkeys(name for relay in held for name in relay.in_use)
    return RelayStatus(in_use=tuple(name for name in names if name not in missing), not_in_use=missing)


def _tunnels(tunnels: Iterable[TunnelStatus]) -> tuple[TunnelStatus, ...]:
    by_peer: dict[str, TunnelStatus] = {}
    for each in tunnels:
        had = by_peer.get(each.peer, TunnelStatus(peer=each.peer, idle=0, leased=0))
        by_peer[each.peer] = structs.replace(had, idle=had.idle + each.idle, leased=had.leased + each.leased)
    return tuple(by_peer.values())
