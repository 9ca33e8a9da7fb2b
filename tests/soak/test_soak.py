"""The soak itself, briefly, and what it says of others'."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from tests.soak.judge import GRACE, Call, Fault, idle_clients, summary, unexplained
from tests.soak.kind import EVERYBODY, Kind
from tests.soak.soak import soak
from tests.soak.stage import GREETER
from tests.soak.talk import Mood, Talker, greet
from tests.world import World

KILLED = Fault("sidecar killed", 10.0, 12.0, EVERYBODY)
PULLED = Fault("cable pulled for a moment", 20.0, 21.0)


@pytest.mark.parametrize(
    ("began", "ended", "explained"),
    [
        (9.0, 10.5, True),
        (12.0 + GRACE, 13.0 + GRACE, True),
        (8.0, 9.5, False),
        (12.5 + GRACE, 13.0 + GRACE, False),
        (20.5, 20.6, False),  # nobody should have noticed
    ],
)
def test_a_failed_call_is_explained_by_a_fault_that_clients_may_notice(
    began: float, ended: float, explained: bool
) -> None:
    wrong = unexplained([Call("curl", began, ended, "reset")], [KILLED, PULLED])
    assert wrong == ([] if explained else [f"curl failed, {began:.1f} to {ended:.1f} s: reset"])


@pytest.mark.netns
def test_a_fault_explains_the_failures_of_those_alone_who_have_to_do_with_it(world: World) -> None:
    kind = Kind("sidecar killed", lambda host: None, EVERYBODY)
    api, twin = (Fault(kind.what, 10.0, 12.0, kind.excuses(world.host(name))) for name in ("api", "twin"))
    greeting, download = Call("server first 1", 10.5, 11.0, "reset"), Call("curl", 10.5, 11.0, "reset")
    assert unexplained([greeting, download], [api]) == []
    assert unexplained([greeting, download], [twin]) == ["curl failed, 10.5 to 11.0 s: reset"]


def test_a_call_that_went_well_needs_no_fault() -> None:
    assert unexplained([Call("curl", 1.0, 2.0)], []) == []


def test_who_was_never_served_is_named_and_everything_is_counted() -> None:
    calls = [Call("curl", 1.0, 2.0), Call("curl", 3.0, 4.0, "reset"), Call("redis", 1.0, 2.0, "reset")]
    assert idle_clients(calls, ["curl", "redis"]) == ["redis was never served"]
    assert summary(calls, [KILLED, KILLED]) == [
        "curl: 2 calls, 1 of them failed",
        "redis: 1 calls, 1 of them failed",
        "sidecar killed: 2 times",
    ]


@pytest.fixture
def talker(world: World) -> Iterator[Talker]:
    talker = Talker(world.host("api"), GREETER, greets=True)
    yield talker
    talker.close()


@pytest.mark.netns
@pytest.mark.parametrize(
    ("mood", "error"),
    [
        (Mood.USUAL, None),
        (Mood.SILENT, TimeoutError),
        (Mood.RESETS, ConnectionResetError),
        (Mood.TRICKLES, None),
        (Mood.LINGERS, None),
    ],
)
def test_an_application_of_any_mood_fails_those_who_call_it_as_it_says(
    world: World, talker: Talker, mood: Mood, error: type[OSError] | None
) -> None:
    api = world.hosts["api"]
    talker.mood = mood
    with pytest.raises(error) if error else nullcontext():
        greet(api, api.address, GREETER, timeout=1.0)
    talker.mood = Mood.USUAL
    greet(api, api.address, GREETER)


@pytest.mark.netns
@pytest.mark.usefixtures("world")
def test_twenty_seconds_of_it() -> None:
    said: list[str] = []
    report = soak(20.0, 7, said.append)
    assert report.wrong == [], "\n".join([*said, *report.lines])
    assert any("times" in line for line in report.lines), said
