"""What is kept of the endpoints among which one was chosen."""

import random
import time

import pytest

from meshnet.model.address import Address
from meshnet.model.service import Endpoint, Mode, ServicePort
from meshnet.proxy.candidates import Candidates
from tests.proxy.test_state import a_state, eject, mesh


def of_endpoints(count: int) -> ServicePort:
    hosts = (f"10.{number >> 8}.{number & 255}.9" for number in range(count))
    endpoints = tuple(Endpoint(address=Address(each, 80)) for each in hosts)
    return ServicePort(service="many", namespace="default", port=80, mode=Mode.PERMISSIVE, endpoints=endpoints)


@pytest.mark.parametrize(("count", "kept"), [(1, 0), (2, 2), (8, 8), (10_000, 2)])
async def test_of_thousands_those_are_kept_that_were_compared(count: int, kept: int) -> None:
    service = of_endpoints(count)
    async with a_state(mesh(1)) as state:
        candidates = Candidates(service, state, set(), time.monotonic())
        found = state.balancer(service).pick(service.traffic, service.endpoints, candidates, random.Random(1))
        weighed = candidates.weighed(service.endpoints)
    assert found is not None
    assert len(weighed) == kept
    assert not kept or found.name in {each.endpoint for each in weighed}


async def test_who_is_taken_for_want_of_others_has_a_score_and_what_is_wrong_with_it() -> None:
    service = of_endpoints(2)
    async with a_state(mesh(1)) as state:
        for endpoint in service.endpoints:
            eject(state.endpoint(endpoint, service))
        candidates = Candidates(service, state, set(), time.monotonic())
        assert [each.score for each in candidates.weighed(service.endpoints)] == [None, None]
        candidates.panics = True
        weighed = candidates.weighed(service.endpoints)
    assert [(each.score, each.why_not[:13]) for each in weighed] == [(1.0, "it is ejected")] * 2
