"""The answers of several workers as the one that their parent gives. Pure."""

from collections.abc import Iterable, Sequence
from itertools import chain

from msgspec import structs

from meshnet.model.admin import (
    ENDPOINT_STATES,
    CertificateStatus,
    ConfigStatus,
    ConnectionList,
    ConnectionListMetadata,
    EndpointView,
    RelayStatus,
    Status,
    TunnelStatus,
    WorkerStatus,
)

_NO_MORE = (0, 0)  # see meshnet.proxy.past.Cursor
_STATES = ("unresolved", *ENDPOINT_STATES)  # the worst last
_CHECKS = ("", "passing", "panic", "failing")  # the same


def merge_lists(lists: Sequence[ConnectionList | None]) -> ConnectionList:
    """Parts that the workers have given, in their order; None: that one did not, or had no more.

    The items in the order of one process: those that have ended, as they did, then the open ones, as they began. Some
    part there is.
    """
    given = [each for each in lists if each is not None]
    metadata = [each.metadata for each in given]
    items = sorted(
        (item for each in given for item in each.items),
        key=lambda it: (it.reason is None, it.opened_at if it.reason is None else it.closed_at),
    )
    before = [each.metadata.before or _NO_MORE if each else _NO_MORE for each in lists]
    return ConnectionList(
        metadata=ConnectionListMetadata(
            node=metadata[0].node,
            generated_at=max(each.generated_at for each in metadata),
            open=sum(each.open for each in metadata),
            failed=sum(each.failed for each in metadata),
            plaintext=sum(each.plaintext for each in metadata),
            before=tuple(chain.from_iterable(before)) if any(map(any, before)) else (),
            forgotten=sum(each.forgotten for each in metadata),
            reaches_back=max(each.reaches_back for each in metadata),
            failed_reach_back=max(each.failed_reach_back for each in metadata),
        ),
        items=tuple(items),
    )


def parts_of(before: Sequence[int], workers: int) -> list[tuple[int, ...]] | None:
    """What each worker is to be asked for, of a `before` that `merge_lists` has given; empty: nothing more.

    None if it is of another number of workers.
    """
    size = len(_NO_MORE)
    if len(before) != size * workers:
        return None
    parts = [tuple(before[at : at + size]) for at in range(0, len(before), size)]
    return [part if any(part) else () for part in parts]


def merge_endpoints(lists: Iterable[Sequence[EndpointView]]) -> tuple[EndpointView, ...]:
    """Connections added up; the state as the worker sees it who sees the worst, and how many see that."""
    views: dict[tuple[str, str, str], list[EndpointView]] = {}
    for listed in lists:
        for view in listed:
            views.setdefault((view.service, view.endpoint, view.dns_name if not view.endpoint else ""), []).append(view)
    return tuple(map(_endpoint, views.values()))


def _endpoint(views: Sequence[EndpointView]) -> EndpointView:
    worst = max(
        views,
        key=lambda view: (
            _STATES.index(view.state),
            max(view.open_for_seconds, view.ejected_for_seconds),
            view.failures,
        ),
    )
    return structs.replace(
        worst,
        connections=sum(view.connections for view in views),
        pending=sum(view.pending for view in views),
        last_error=worst.last_error or next((view.last_error for view in views if view.last_error), ""),
        workers=sum(view.state == worst.state for view in views),
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
