"""The connections that a sidecar knows, asked for part by part: those of a busy hour may be a million."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from meshnet.model.admin import ConnectionList, ConnectionListMetadata, ListConnections
from meshnet.model.connection import Connection
from meshnet_cli import filters
from meshnet_cli.client import ask


@dataclass(frozen=True, slots=True)
class Listing:
    """`items`: those that were wanted, ended ones first as they ended, then the open ones; of `known` connections."""

    metadata: ConnectionListMetadata
    items: tuple[Connection, ...]
    known: int


def listing(
    socket_path: str,
    question: ListConnections,
    *,
    timeout: float,
    wanted: Callable[[Connection], bool] = lambda _: True,
    since: float | None = None,
) -> Listing:
    """All parts of it, with `since` those of so many seconds. Raises CommandError as `ask` does."""
    items: list[Connection] = []
    first: ConnectionListMetadata | None = None
    silent = known = 0
    for part in _parts(socket_path, question, timeout):
        first = first or part.metadata
        silent = max(silent, part.metadata.silent_workers)
        known += len(part.items)
        recent: Sequence[Connection] = part.items
        if since is not None:
            recent = list(filter(filters.since(since, first.generated_at), part.items))
        items += filter(wanted, recent)
        if part.items and not recent and part.metadata is not first:
            break  # what ended before these is not either; the first part is of two kinds, of which one may be old
    assert first is not None  # or there would have been an error
    if first.before:
        items.sort(key=lambda it: (it.reason is None, it.closed_at))  # open ones stay in their order
    return Listing(msgspec.structs.replace(first, silent_workers=silent, before=()), tuple(items), known)


def _parts(socket_path: str, question: ListConnections, timeout: float) -> Iterator[ConnectionList]:
    while True:
        answer = ask(socket_path, question, ConnectionList, timeout=timeout)
        yield answer
        if not answer.metadata.before:
            return
        question = msgspec.structs.replace(question, before=answer.metadata.before)
