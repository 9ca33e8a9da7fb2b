import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from meshnet.decide.limits import Admitted, Limiter, Queued, Rejected, Ticket, below_endpoint_limit
from meshnet.errors import Reason
from meshnet.model.service import Limits


def limiter(connections: int = 0, pending: int = 0, timeout: float = 3.0) -> Limiter:
    return Limiter(Limits(max_connections=connections, max_pending=pending, queue_timeout=timeout))


def queue(held: Limiter, now: float = 0.0) -> Ticket:
    outcome = held.enter(now)
    assert isinstance(outcome, Queued)
    return outcome.ticket


def test_up_to_the_limit_everyone_goes_straight_in() -> None:
    held = limiter(2)
    assert held.enter(0.0) == held.enter(0.0) == Admitted()
    assert (held.open, held.pending) == (2, 0)


def test_beyond_the_limit_there_is_a_queue_with_a_deadline() -> None:
    held = limiter(1, timeout=3.0)
    held.enter(0.0)
    outcome = held.enter(10.0)
    assert isinstance(outcome, Queued)
    assert outcome.deadline == 13.0
    assert (held.open, held.pending) == (1, 1)


def test_beyond_the_queue_there_is_a_refusal() -> None:
    held = limiter(1, 1)
    held.enter(0.0)
    held.enter(0.0)
    assert held.enter(0.0) == Rejected(Reason.LIMIT_CONNECTIONS)
    assert (held.open, held.pending) == (1, 1)


def test_who_leaves_lets_the_first_in_the_queue_in() -> None:
    held = limiter(1)
    held.enter(0.0)
    first, second = queue(held), queue(held)
    assert held.leave(1.0) == [first]
    assert held.leave(2.0) == [second]
    assert held.leave(3.0) == []
    assert (held.open, held.pending) == (0, 0)


def test_zero_means_no_limit_and_no_deadline() -> None:
    held = limiter(0)
    assert all(held.enter(0.0) == Admitted() for _ in range(5000))
    patient = limiter(1, timeout=0.0)
    patient.enter(0.0)
    for _ in range(5000):
        outcome = patient.enter(0.0)
        assert isinstance(outcome, Queued)
        assert outcome.deadline == float("inf")


def test_a_newcomer_does_not_overtake_the_queue_when_the_limit_was_raised() -> None:
    held = limiter(1)
    held.enter(0.0)
    first = queue(held)
    held.settings = Limits(max_connections=2)
    second = queue(held)
    assert held.changed(0.0) == [first]
    assert held.leave(0.0) == [second]


def test_a_raised_limit_lets_as_many_in_as_it_was_raised_by() -> None:
    held = limiter(1)
    held.enter(0.0)
    tickets = [queue(held) for _ in range(5)]
    held.settings = Limits(max_connections=4)
    assert held.changed(0.0) == tickets[:3]
    held.settings = Limits(max_connections=0)
    assert held.changed(0.0) == tickets[3:]


def test_a_lowered_limit_ends_nothing_and_admits_nobody_until_it_is_met() -> None:
    held = limiter(3)
    for _ in range(3):
        held.enter(0.0)
    waiting = queue(held)
    held.settings = Limits(max_connections=1)
    assert held.changed(0.0) == []
    assert held.open == 3
    assert [held.leave(0.0), held.leave(0.0)] == [[], []]
    assert held.leave(0.0) == [waiting]


def test_who_gives_up_leaves_the_queue_and_frees_nothing() -> None:
    held = limiter(1)
    held.enter(0.0)
    first, second = queue(held), queue(held)
    assert held.give_up(first, 1.0) == []
    assert held.pending == 1
    assert held.leave(1.0) == [second]


def test_who_gives_up_after_its_turn_came_hands_it_on() -> None:
    held = limiter(1)
    held.enter(0.0)
    first, second = queue(held), queue(held)
    assert held.leave(1.0) == [first]
    assert held.give_up(first, 1.0) == [second]
    assert held.give_up(first, 1.0) == []
    assert (held.open, held.pending) == (1, 0)


def test_a_connection_that_gets_free_a_moment_late_goes_to_who_still_waits() -> None:
    held = limiter(1, timeout=3.0)
    held.enter(0.0)
    waiting = queue(held, 0.0)
    assert held.leave(3.1) == [waiting]


def test_many_leave_at_once_and_as_many_have_their_turn() -> None:
    held = limiter(3)
    assert [held.enter(0.0) for _ in range(3)] == [Admitted()] * 3
    first, second, third = (queue(held, 0.0) for _ in range(3))
    assert held.leave(1.0, 2) == [first, second]
    assert held.leave(2.0) == [third]


def test_leaving_without_having_been_in_is_an_error() -> None:
    with pytest.raises(RuntimeError):
        limiter(1).leave(0.0)
    held = limiter(1)
    held.enter(0.0)
    with pytest.raises(RuntimeError):
        held.leave(1.0, 2)


@pytest.mark.parametrize(
    ("most", "opened", "pending", "below"),
    [(0, 999, 999, True), (3, 1, 1, True), (3, 2, 1, False), (3, 0, 3, False), (3, 4, 0, False)],
)
def test_an_endpoints_own_limit_counts_what_is_open_and_what_is_being_dialled(
    most: int, opened: int, pending: int, below: bool
) -> None:
    assert below_endpoint_limit(Limits(max_connections_per_endpoint=most), opened + pending) is below


SIZES = st.integers(0, 4)


class LimiterLife(RuleBasedStateMachine):
    """Beside the limiter a plain list of who waits, oldest first, and a set of who is in with a ticket."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.waiting: list[Ticket] = []
        self.called: list[Ticket] = []  # admitted, and may not have noticed yet
        self.inside = 0

    @initialize(connections=SIZES, pending=SIZES, timeout=st.integers(0, 3))
    def begins(self, connections: int, pending: int, timeout: int) -> None:
        self.limiter = limiter(connections, pending, float(timeout))

    def admitted(self, tickets: list[Ticket]) -> None:
        assert tickets == self.waiting[: len(tickets)], "first come, first served"
        del self.waiting[: len(tickets)]
        self.called += tickets
        self.inside += len(tickets)
        most = self.limiter.settings.max_connections
        assert not tickets or not most or self.inside <= most

    @rule(seconds=st.integers(0, 2))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def somebody_comes(self) -> None:
        settings = self.limiter.settings
        room = not settings.max_connections or self.inside < settings.max_connections
        place = not settings.max_pending or len(self.waiting) < settings.max_pending
        match self.limiter.enter(self.now):
            case Admitted():
                assert room
                assert not self.waiting, "nobody overtakes the queue"
                self.inside += 1
            case Queued(ticket, deadline):
                assert place
                assert not room
                assert deadline == (self.now + settings.queue_timeout if settings.queue_timeout else float("inf"))
                self.waiting.append(ticket)
            case Rejected():
                assert not room
                assert not place

    @rule(most=st.integers(0, 5))
    def some_are_reserved(self, most: int) -> None:
        limit = self.limiter.settings.max_connections
        count = self.limiter.reserve(most)
        if self.waiting:
            assert not count, "nobody overtakes the queue"
        else:
            free = max(0, limit - self.inside)
            assert count == (min(most, free // 2) if limit else most)
        self.inside += count

    @precondition(lambda self: self.inside > len(self.called))
    @rule()
    def somebody_without_a_ticket_leaves(self) -> None:
        self.inside -= 1
        self.admitted(self.limiter.leave(self.now))

    @precondition(lambda self: self.called)
    @rule(data=st.data(), notices=st.booleans())
    def somebody_who_was_called_leaves_or_gives_up(self, data: st.DataObject, notices: bool) -> None:
        ticket = self.called.pop(data.draw(st.integers(0, len(self.called) - 1)))
        self.inside -= 1
        self.admitted(self.limiter.leave(self.now) if notices else self.limiter.give_up(ticket, self.now))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def somebody_who_waits_gives_up(self, data: st.DataObject) -> None:
        ticket = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        self.admitted(self.limiter.give_up(ticket, self.now))
        self.admitted(self.limiter.give_up(ticket, self.now))

    @rule(connections=SIZES, pending=SIZES, timeout=st.integers(0, 3))
    def settings_change(self, connections: int, pending: int, timeout: int) -> None:
        self.limiter.settings = Limits(max_connections=connections, max_pending=pending, queue_timeout=float(timeout))
        self.admitted(self.limiter.changed(self.now))

    @invariant()
    def the_counts_agree_and_nobody_waits_while_there_is_room(self) -> None:
        if not hasattr(self, "limiter"):
            return
        assert (self.limiter.open, self.limiter.pending) == (self.inside, len(self.waiting))
        most = self.limiter.settings.max_connections
        assert not self.waiting or (most and self.inside >= most)


TestLimiterLife = LimiterLife.TestCase
