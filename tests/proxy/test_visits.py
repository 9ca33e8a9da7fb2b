"""Who asks for readiness through the rules, as the sidecar tells of it: once a change, in log, status and metrics."""

import logging

import pytest

from meshnet.proxy.visits import InboundVisits


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_who_stops_coming_is_told_once_and_so_is_his_return(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "meshnet.capture")
    clock = Clock()
    visits = InboundVisits(clock)
    visits.look()
    assert (list(visits.proofs()), visits.views(), visits.times()) == ([], (), [])
    for _ in range(5):
        clock.now += 5
        visits.came("ipv6")
        visits.look()
    (proof,) = visits.proofs()
    assert (proof.direction, proof.family, proof.result) == ("inbound", "ipv6", "captured")
    (view,) = visits.views()
    assert (view.family, view.every_seconds, view.late) == ("ipv6", 5.0, False)
    assert messages(caplog) == ["inbound IPv6 is captured: readiness is asked for through the rules"]

    caplog.clear()
    clock.now += 60
    for _ in range(3):
        visits.look()
    (told,) = messages(caplog)
    assert told.startswith(
        "inbound IPv6 may not be captured any more: readiness was last asked for through the rules at 2"
    )
    assert told.endswith(", before that every 5 s")
    (proof,) = visits.proofs()
    assert (proof.result, visits.views()[0].late) == ("no answer", True)

    caplog.clear()
    visits.came("ipv6")
    visits.look()
    assert messages(caplog) == ["inbound IPv6 is captured again: readiness is asked for through the rules"]
    assert [each.result for each in visits.proofs()] == ["captured"]


def test_the_families_are_apart() -> None:
    clock = Clock()
    visits = InboundVisits(clock)
    for _ in range(5):
        clock.now += 5
        visits.came("ipv4")
    clock.now += 60
    visits.came("ipv6")
    assert {each.family: each.result for each in visits.proofs()} == {"ipv4": "no answer", "ipv6": "captured"}
    assert [family for family, _ in visits.times()] == ["ipv4", "ipv6"]
