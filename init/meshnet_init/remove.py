"""Takes the rules out without cutting what they redirected. Needs no knowledge of what put them there.

A keeper is told to stand down, or it would put them in again. Then

1. A drain set takes the rules' place: nothing new is captured, address translation goes on for what was.
2. Wait until no connection on the redirect ports is left.
3. Cut those that are: a reset reaches its client only as long as it is translated.
4. Delete.
"""

import time
from collections.abc import Callable, Collection, Iterator

import msgspec

from meshnet.errors import CommandError
from meshnet.model.capture import StandDown
from meshnet.net.keeper import tell_keeper
from meshnet_init.apply import in_kernel
from meshnet_init.backends import need_right_to_change
from meshnet_init.choose import every_backend, unseen_legacy
from meshnet_init.host import open_connections
from meshnet_init.routing import connections_in_clients_names, route

_LOOK_AGAIN = 0.2  # seconds


class Removed(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """`backends` is empty when nothing was installed; `waited_for` connections at first, `cut` of them at the end.

    `unseen` are legacy tables that could not be looked at, for the reason `blind`.
    """

    backends: tuple[str, ...]
    waited_for: int = 0
    cut: int = 0
    unseen: tuple[str, ...] = ()
    blind: str = ""

    def warnings(self) -> Iterator[str]:
        if self.unseen:
            tables = ", ".join(self.unseen)
            yield f"rules may be left in the legacy tables ({tables}): {self.blind}"


def remove(
    drain: float = 30.0,
    waiting: Callable[[int], object] = lambda _: None,
    cut: Callable[[], object] = lambda: None,
) -> Removed:
    """Removes whatever is installed here, by whichever backend, after at most `drain` seconds.

    Calls `waiting` with the number of connections still open, at first and whenever it changes. Calls `cut` if some
    outlive the wait: it has the sidecar reset them. A client of one that nobody resets does not learn of its end
    before it sends something. Safe to run again after a crash at any point. Raises CommandError.
    """
    need_right_to_change()
    _have_nobody_keep_them()
    removed = _remove(drain, waiting, cut)
    if _have_nobody_keep_them():  # one that has begun meanwhile may have put them in again
        _remove(0.0, waiting, cut)
    return removed


def _open(ports: Collection[int]) -> int:
    return max(open_connections(ports), connections_in_clients_names())


def _have_nobody_keep_them() -> bool:
    """Whether there is a keeper, which then leaves the rules alone. Raises CommandError."""
    keeper = tell_keeper(StandDown())
    if keeper is not None and keeper.state != "stood down":
        raise CommandError(
            f"the keeper of the rules (pid {keeper.pid}) does not stand down",
            why="it would put them in again; it is busy with something",
            fix=f"try again, or end it first: sudo kill {keeper.pid}",
        )
    return keeper is not None


def _remove(drain: float, waiting: Callable[[int], object], cut: Callable[[], object]) -> Removed:
    found = in_kernel()
    ports: set[int] = set()
    for backend, installed in found:
        ports |= installed.redirect_ports()
        if not installed.draining():
            backend.apply(installed.drain_set())

    first = left = _open(ports) if found else 0
    deadline = time.monotonic() + drain
    if left:
        waiting(left)
    while left and time.monotonic() < deadline:
        time.sleep(_LOOK_AGAIN)  # noqa: TID251  # the kernel tells nobody when a socket of another process closes
        now = _open(ports)
        if now != left:
            left = now
            waiting(left)

    try:
        if left:
            cut()
    finally:
        for backend, _ in found:
            backend.delete()
        route(None)
    for backend in every_backend():
        backend.sweep()
    unseen, blind = unseen_legacy()
    return Removed(
        backends=tuple(backend.name for backend, _ in found),
        waited_for=first,
        cut=left,
        unseen=unseen,
        blind=blind,
    )
