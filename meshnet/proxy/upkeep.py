"""What a sidecar does every so often: ejects endpoints that fail too often, ends connections that are overdue."""

import logging
import time
from collections import defaultdict

import trio

from meshnet.decide.lifetime import IDLE_MOMENT, overdue, surplus
from meshnet.decide.locality import distance
from meshnet.decide.outlier import Outcomes, to_eject
from meshnet.errors import EndedBy, Reason
from meshnet.model.address import Address
from meshnet.model.connection import Direction
from meshnet.model.service import Balance, OnEject, Outlier, ServicePort, Timeouts
from meshnet.model.snapshot import Snapshot
from meshnet.proxy.candidates import Candidates
from meshnet.proxy.record import Record
from meshnet.proxy.slices import slices
from meshnet.proxy.state import ProxyState

_log = logging.getLogger("meshnet.proxy")

_REBALANCE_EVERY = 10.0  # seconds
_LOOK_EVERY = 1.0  # at connections, where a policy says how long they may live
_LOOK_SELDOM = 15.0  # where none does: those that are half-closed have minutes
_DEFAULT = Timeouts()
_CHOOSES_AGAIN_ALIKE = (Balance.MAGLEV, Balance.FIRST)  # whoever has how many: there is nothing to rebalance


class Upkeep:
    def __init__(self, state: ProxyState) -> None:
        self._state = state
        self._of: Snapshot | None = None  # what the two below are made of
        self._timeouts: dict[str, Timeouts] = {}  # by service, where they are not the default
        self._rebalanced: list[ServicePort] = []
        self._budgets: dict[str, float] = {}  # by service: how many connections may be ended to rebalance
        self._interval = Outlier().interval  # the shortest of all services
        self._looked = self._reviewed = self._balanced = time.monotonic()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await trio.sleep(_LOOK_EVERY)
            self._read_policies()
            now = time.monotonic()
            if self._timeouts or self._state.removed or now - self._looked >= _LOOK_SELDOM:
                self._looked = now
                await self._end_overdue()
                await self._state.forget_gone(now)
            if now - self._reviewed >= self._interval:
                self._reviewed = now
                await self._eject()
            if self._rebalanced and now - self._balanced >= _REBALANCE_EVERY:
                self._balanced = now
                await self._rebalance()

    def _read_policies(self) -> None:
        if self._of is self._state.snapshot:
            return
        self._of = snapshot = self._state.snapshot
        policies = {id(service.traffic): service.traffic for service in snapshot.services}.values()
        self._interval = min((each.outlier.interval for each in policies), default=Outlier().interval)
        self._timeouts = {
            service.name: service.traffic.timeouts
            for service in snapshot.services
            if service.traffic.timeouts != _DEFAULT
        }
        self._rebalanced = [
            service
            for service in snapshot.services
            if service.traffic.rebalance.above and service.traffic.balance not in _CHOOSES_AGAIN_ALIKE
        ]

    async def _end_overdue(self) -> None:
        state = self._state
        state.registry.catch_up()
        for records in slices(state.registry.open.values()):
            now = time.monotonic()
            for record in records:
                self._look_at(record, now)
            await trio.lowlevel.checkpoint()
        state.removed = {
            name: (address, until)
            for name, (address, until) in state.removed.items()
            if time.monotonic() < until + _REBALANCE_EVERY
        }

    def _look_at(self, record: Record, now: float) -> None:
        if record.connected is None:
            return
        gone = self._state.removed.get(record.endpoint)
        if gone is not None and now >= gone[1] and record.direction is Direction.OUTBOUND:
            record.abort(Reason.ENDPOINT_REMOVED, EndedBy.POLICY, f"{record.endpoint} is not in the mesh any more")
            return
        tally = record.tally
        tally.refresh()
        why = overdue(
            self._timeouts.get(record.service, _DEFAULT) if record.direction is Direction.OUTBOUND else _DEFAULT,
            age=now - record.opened,
            idle=_idle(record, now),
            half_closed=tally.client_done or tally.endpoint_done,
            connection=record.id,
        )
        if why is not None:
            reason, detail = why
            record.abort(reason, EndedBy.POLICY, detail)

    async def _eject(self) -> None:
        """Of each service with endpoints that were dialled, the ones that fail far too often."""
        state = self._state
        dialled: dict[int, tuple[ServicePort, dict[Address, Outcomes]]] = {}
        for addresses in slices(state.endpoints):
            for address in addresses:
                if (found := state.snapshot.by_endpoint.get(address)) and (known := state.endpoints.get(address)):
                    service, _ = found
                    dialled.setdefault(id(service), (service, {}))[1][address] = known.outcomes
            await trio.lowlevel.checkpoint()
        for service, outcomes in dialled.values():
            settings, now = service.traffic.outlier, time.monotonic()
            count = sum(endpoint.weight > 0 for endpoint in service.endpoints)
            for each in to_eject(outcomes, count, settings, now):
                seconds = outcomes[each.endpoint].eject(settings, now, state.dice)
                state.warming[each.endpoint] = now + seconds
                state.metrics.ejections += 1
                share = f"{each.failures} of {each.connects} connects failed within {settings.window:g} s"
                _log.warning("%s of %s is ejected for %.0f s: %s", each.endpoint, service.name, seconds, share)
                if service.traffic.on_eject is OnEject.CLOSE:
                    state.close_endpoint(state.snapshot.by_endpoint[each.endpoint][1], f"it is ejected: {share}")
            await trio.lowlevel.checkpoint()

    async def _rebalance(self) -> None:
        """Ends some long-lived connections of endpoints that have far more than their share, while they are idle."""
        state = self._state
        for service in self._rebalanced:
            settings, now = service.traffic.rebalance, time.monotonic()
            most = float(settings.per_minute)
            earned = self._budgets.get(service.name, 0.0) + most * _REBALANCE_EVERY / 60
            self._budgets[service.name] = min(earned, most)
            # Among those that are equally near: whose connection ends finds its next endpoint among these.
            groups: dict[int, dict[str, tuple[int, int]]] = defaultdict(dict)
            candidates = Candidates(service, state, set(), now)
            for endpoint in service.endpoints:
                if candidates.is_well(endpoint):
                    known = state.endpoints.get(endpoint.address)
                    near = distance(state.here, endpoint.locality)
                    groups[near][endpoint.name] = (known.connections if known else 0, endpoint.weight)
            left: dict[str, int] = {}
            for loads in groups.values():
                left |= surplus(loads, settings.above)
            if not left:
                continue
            idle: dict[str, list[tuple[float, Record]]] = defaultdict(list)
            for record in state.registry.open.values():
                if record.endpoint in left and record.direction is Direction.OUTBOUND and record.connected:
                    record.tally.refresh()
                    quiet = _idle(record, now)
                    idle[record.endpoint].append((now - record.opened if quiet is None else quiet, record))
            for name, number in left.items():
                for quiet, record in sorted(idle[name], key=lambda each: -each[0])[:number]:
                    if quiet < IDLE_MOMENT or self._budgets[service.name] < 1:
                        break
                    self._budgets[service.name] -= 1
                    why = f"{name} had {len(idle[name])} connections, too many"
                    record.abort(Reason.REBALANCE, EndedBy.POLICY, why)
            await trio.lowlevel.checkpoint()


def _idle(record: Record, now: float) -> float | None:
    return now - record.tally.moved_at if record.tally.moved_at else None
