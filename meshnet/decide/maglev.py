"""The same source always gets the same endpoint, and when endpoints come and go, few sources get another one.

D. E. Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer" (NSDI 2016), section 3.4. Every
proxy makes the same table of the same endpoints, in whatever order they are listed.
"""

from array import array
from collections.abc import Callable, Sequence
from hashlib import blake2b

from meshnet.model.service import Endpoint

# Slots for each endpoint: its share is within a few percent of what it should be.
_SLOTS_EACH = 100
# Primes, so that every step walks through the whole table. Beyond the last an endpoint has fewer slots.
_SIZES = (1009, 2003, 4001, 8009, 16007, 32003, 65537)
_DRAWS = 32  # other slots that are tried for a source whose endpoint is out, before all are looked at


class Maglev:
    """The table for some endpoints. To make one takes a microsecond for each slot, and a slot has 2 bytes."""

    __slots__ = ("_endpoints", "_table")

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._endpoints = sorted((each for each in endpoints if each.weight), key=lambda each: each.address)
        self._table = _table(self._endpoints)

    def pick(self, source: str, willing: Callable[[Endpoint], bool]) -> Endpoint | None:
        """The endpoint of `source`; the next one of its own row where that may not be tried now."""
        if not self._endpoints:
            return None
        for number in range(_DRAWS):
            slot = _hash(source, number) % len(self._table)
            endpoint = self._endpoints[self._table[slot]]
            if willing(endpoint):
                return endpoint
        left = [endpoint for endpoint in self._endpoints if willing(endpoint)]
        return left[_hash(source, _DRAWS) % len(left)] if left else None


def _table(endpoints: Sequence[Endpoint]) -> "array[int]":
    """The number of the endpoint of each slot. They choose in turns, each the next free slot of its own order."""
    size = next((size for size in _SIZES if size >= _SLOTS_EACH * len(endpoints)), _SIZES[-1])
    table = array("H", bytes(2 * size))
    if not endpoints:
        return table
    heaviest = max(endpoint.weight for endpoint in endpoints)
    places, steps = [], []
    for endpoint in endpoints:
        places.append(_hash(endpoint.name, 0) % size)
        steps.append(_hash(endpoint.name, 1) % (size - 1) + 1)
    taken = bytearray(size)
    due = [0.0] * len(endpoints)  # the turns that each has gathered: one a round for the heaviest, a part for others
    left = size
    while True:
        for number, endpoint in enumerate(endpoints):
            due[number] += endpoint.weight / heaviest
            if due[number] < 1:
                continue
            due[number] -= 1
            place, step = places[number], steps[number]
            while taken[place]:
                place = (place + step) % size
            taken[place] = 1
            table[place] = number
            places[number] = place
            left -= 1
            if not left:
                return table


def _hash(text: str, number: int) -> int:
    return int.from_bytes(blake2b(f"{number} {text}".encode(), digest_size=8).digest(), "big")
