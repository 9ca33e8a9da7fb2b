"""What may be said of a soak when it is over. Values in, sentences out; times are monotonic seconds."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

GRACE = 3.0  # seconds in which breakers, and clients with pauses of their own, find out that a fault is over


@dataclass(frozen=True, slots=True)
class Call:
    """What one client did once; `error` is empty when all was well."""

    client: str
    began: float
    ended: float
    error: str = ""


@dataclass(frozen=True, slots=True)
class Fault:
    """`excuses`: these clients may notice, for its whole time and a little after."""

    what: str
    began: float
    ended: float
    excuses: frozenset[str] = frozenset()

    def explains(self, call: Call) -> bool:
        return call.client in self.excuses and call.began <= self.ended + GRACE and call.ended >= self.began


def unexplained(calls: Iterable[Call], faults: Sequence[Fault]) -> list[str]:
    """A line for each failed call that no fault explains."""
    return [
        f"{call.client} failed, {call.began:.1f} to {call.ended:.1f} s: {call.error}"
        for call in calls
        if call.error and not any(fault.explains(call) for fault in faults)
    ]


def idle_clients(calls: Iterable[Call], clients: Iterable[str]) -> list[str]:
    """A line for each client of which no call went well: a soak says nothing of it."""
    well = {call.client for call in calls if not call.error}
    return [f"{client} was never served" for client in clients if client not in well]


def summary(calls: Iterable[Call], faults: Iterable[Fault]) -> list[str]:
    """How many calls of each client there were, how many failed, and how often each fault was there."""
    every, failed = Counter[str](), Counter[str]()
    for call in calls:
        every[call.client] += 1
        failed[call.client] += bool(call.error)
    lines = [f"{client}: {count} calls, {failed[client]} of them failed" for client, count in sorted(every.items())]
    counted = Counter(fault.what for fault in faults)
    return [*lines, *(f"{what}: {count} times" for what, count in sorted(counted.items()))]
