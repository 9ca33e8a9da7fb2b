"""The promises, over hours of faults in virtual time.

MESHNET_SIMULATED_HOURS=1000 makes it as many as you like, by more seeds: a processor makes about 15 of them a minute.
MESHNET_SIMULATED_SEED is the first seed.
"""

import math
import os
from collections import Counter

import pytest

from meshnet.errors import Reason
from tests.simulation.mesh import MOST, Simulation, simulate
from tests.simulation.network import CONDITIONS

pytestmark = pytest.mark.timeout(600)  # a seed of the longest on a machine that has much to do

HOURS = float(os.environ.get("MESHNET_SIMULATED_HOURS", "2"))
_FIRST = int(os.environ.get("MESHNET_SIMULATED_SEED", "0"))
_LONGEST = 2.0  # hours of one seed: all its records are kept until it is judged
SEEDS = range(_FIRST, _FIRST + max(2, math.ceil(HOURS / _LONGEST)))


@pytest.fixture(scope="module", params=SEEDS)
def simulation(request: pytest.FixtureRequest) -> Simulation:
    return simulate(request.param, HOURS / len(SEEDS), pytest.MonkeyPatch())


def test_every_connection_ends_in_exactly_one_record_with_one_reason(simulation: Simulation) -> None:
    assert simulation.called > 100 * HOURS / len(SEEDS)
    ends = [each for observer in simulation.observers for each in observer.ends.values()]
    assert sum(len(observer.records) for observer in simulation.observers) == simulation.called
    assert set(ends) == {1}
    called = [state for caller in simulation.callers for state in caller.states]
    assert sum(state.registry.opened_total for state in called) == simulation.called
    assert all(not state.registry.open for state in simulation.states)
    assert all(record.reason is not None for observer in simulation.observers for record in observer.records)


def test_a_lease_is_one_record_at_each_end_of_its_tunnel(simulation: Simulation) -> None:
    served: Counter[str] = Counter()
    for server in simulation.servers:
        assert set(server.observer.ends.values()) <= {1}
        assert sum(state.registry.opened_total for state in server.states) == len(server.observer.records)
        served.update(record.id for record in server.observer.records if record.connected is not None)
    leased = {
        record.id
        for observer in simulation.observers
        for record in observer.records
        if record.connected is not None and record.service == "mesh:80"
    }
    assert len(leased) > simulation.called / 20
    assert leased <= served.keys()
    assert set(served.values()) == {1}


def test_nothing_happens_that_must_never_happen(simulation: Simulation) -> None:
    """A meshed endpoint in plain text; one whose breaker is open; an application that policy closes; anything refused
    long after the last fault; a mesh lost by a restart or by files that are no good; a connection reset before its time
    to drain is over.
    """
    assert simulation.network.broken == []


def test_whatever_was_taken_is_given_back(simulation: Simulation) -> None:
    for state in simulation.states:
        assert state.pool.leased == 0  # type: ignore[attr-defined] # it is the simulated one
        assert all(known.open == known.pending == 0 for known in state.endpoints.values())
        assert all(held.limiter.open == held.limiter.pending == 0 for held in state.services.values())
        assert all(not held.waiting for held in state.services.values())


def test_limits_and_retries_keep_to_their_bounds(simulation: Simulation) -> None:
    for observer in simulation.observers:
        moments = sorted(
            moment
            for record in observer.records
            if record.service == "mesh:80" and record.connected is not None and record.ended is not None
            for moment in ((record.connected, 1), (record.ended, -1))
        )
        at_once = most = 0
        for _, change in sorted(moments, key=lambda each: (each[0], each[1])):
            at_once += change
            most = max(most, at_once)
        assert 0 < most <= MOST
        assert all(len(record.attempts) <= 3 for record in observer.records)
        assert any(record.reason is Reason.LIMIT_CONNECTIONS for record in observer.records)


def test_faults_of_all_kinds_were_met_and_told_by_their_own_reasons(simulation: Simulation) -> None:
    assert len(simulation.network.attempts) >= len(CONDITIONS) - 2  # an hour does not have to bring each of them
    reasons = sum((observer.reasons for observer in simulation.observers), Counter[str]())
    assert reasons["ok"] > simulation.called / 8
    assert not {"internal", "config.none"} & reasons.keys()
    assert simulation.restarts
    assert simulation.refused
    assert any(state.metrics.ejections for state in simulation.states)
    assert {"peer.rst", "breaker.open", "authz.denied", "no_endpoint", "limit.connections"} <= set(reasons)
    served = sum((server.observer.reasons for server in simulation.servers), Counter[str]())
    assert "internal" not in served
    assert {"ok", "authz.denied", "connect.refused", "tunnel.lost"} <= set(served)


def test_the_same_seed_is_the_same_run() -> None:
    first, again = (simulate(7, 0.2, pytest.MonkeyPatch()) for _ in range(2))
    assert len(first.story) > 50
    assert first.story == again.story
