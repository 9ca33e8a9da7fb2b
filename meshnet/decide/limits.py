"""Limits protect the endpoint side: so many connections to a service at once, so many more in a queue, in order."""

from collections import OrderedDict
from dataclasses import dataclass

from meshnet.errors import Reason
from meshnet.model.service import Limits


@dataclass(slots=True, eq=False)
class Ticket:
    """A place in the queue; a ticket is equal to itself alone. `admitted`: its turn has come."""

    admitted: bool = False


@dataclass(frozen=True, slots=True)
class Admitted:
    """Go on; owes one `leave`."""


@dataclass(frozen=True, slots=True)
class Queued:
    """Wait until a call returns `ticket` (go on; owes one `leave`), or until `deadline` and then `give_up`."""

    ticket: Ticket
    deadline: float


@dataclass(frozen=True, slots=True)
class Rejected:
    """Neither a free connection nor a place in the queue."""

    reason: Reason = Reason.LIMIT_CONNECTIONS


class Limiter:
    """One per service. `open` counts who was admitted and has not left, `pending` who waits; nobody overtakes.

    Calls that may free a connection return the tickets whose turn has come, first come first. `settings` may be
    replaced at any time; call `changed` then. Admission does not look at deadlines, though every call takes the clock:
    who is still there when a connection gets free, be it a moment late, gets it.
    """

    __slots__ = ("_queue", "open", "settings")

    def __init__(self, settings: Limits) -> None:
        self.settings = settings
        self.open = 0
        self._queue: OrderedDict[Ticket, None] = (
            OrderedDict()
        )  # not a dict: its first item is dear to find when many left

    @property
    def pending(self) -> int:
        return len(self._queue)

    def enter(self, now: float) -> Admitted | Queued | Rejected:
        settings = self.settings
        if not self._queue and self._has_room():
            self.open += 1
            return _ADMITTED
        if settings.max_pending and len(self._queue) >= settings.max_pending:
            return _REJECTED
        ticket = Ticket()
        self._queue[ticket] = None
        return Queued(ticket, now + settings.queue_timeout if settings.queue_timeout else float("inf"))

    def leave(self, now: float, connections: int = 1) -> list[Ticket]:
        """Whoever was admitted leaves exactly once. Raises RuntimeError if not so many are in."""
        if self.open < connections:
            raise RuntimeError("more have left than were admitted")
        self.open -= connections
        return self._call_up() if self._queue else []

    def reserve(self, most: int) -> int:
        """Takes up to `most` connections that nobody has asked for yet, and at most half of those that are free.

        How many; each of them leaves once, as if it had been admitted.
        """
        limit = self.settings.max_connections
        count = 0 if self._queue else min(most, (limit - self.open) // 2) if limit else most
        count = max(count, 0)
        self.open += count
        return count

    def give_up(self, ticket: Ticket, now: float) -> list[Ticket]:
        """The wait was too long, or the client is gone. If the ticket's turn has come meanwhile, it leaves instead."""
        if ticket.admitted:
            ticket.admitted = False
            return self.leave(now)
        self._queue.pop(ticket, None)
        return []

    def changed(self, now: float) -> list[Ticket]:
        """After new settings: a raised limit admits more at once; a lowered one ends nothing."""
        return self._call_up()

    def _call_up(self) -> list[Ticket]:
        admitted = []
        while self._queue and self._has_room():
            ticket, _ = self._queue.popitem(last=False)
            ticket.admitted = True
            self.open += 1
            admitted.append(ticket)
        return admitted

    def _has_room(self) -> bool:
        most = self.settings.max_connections
        return not most or self.open < most


_ADMITTED = Admitted()
_REJECTED = Rejected()


def below_endpoint_limit(limits: Limits, connections: int) -> bool:
    """Whether an endpoint that has so many, those still being dialled included, may get one more."""
    most = limits.max_connections_per_endpoint
    return not most or connections < most
