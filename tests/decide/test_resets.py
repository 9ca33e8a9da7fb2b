import pytest

from meshnet.decide.resets import SUSPICIOUS, ResetsAtOnce
from meshnet.errors import EndedBy, Reason

AT_ONCE = (Reason.PEER_RST, EndedBy.SERVER, 0, 0.02, 0.001)


def told(resets: ResetsAtOnce, times: int) -> int:
    return sum(resets.note(*AT_ONCE) for _ in range(times))


def test_it_is_told_once_in_a_row() -> None:
    resets = ResetsAtOnce()
    assert told(resets, SUSPICIOUS - 1) == 0
    assert told(resets, 1) == 1
    assert told(resets, 100) == 0


@pytest.mark.parametrize(
    "ended", [(Reason.PEER_RST, EndedBy.SERVER, 1, 0.02, 0.001), (Reason.OK, EndedBy.CLIENT, 0, 9.0, 0.001)]
)
def test_a_byte_or_a_good_end_begins_the_row_again(ended: tuple[Reason, EndedBy, int, float, float]) -> None:
    resets = ResetsAtOnce()
    told(resets, SUSPICIOUS - 1)
    assert not resets.note(*ended)
    assert (told(resets, SUSPICIOUS - 1), told(resets, 1)) == (0, 1)


@pytest.mark.parametrize(
    "ended",
    [
        (Reason.PEER_RST, EndedBy.CLIENT, 0, 0.02, 0.001),
        (Reason.PEER_RST, EndedBy.SERVER, 0, 0.5, 0.001),  # it was thought over
        (Reason.IDLE, EndedBy.POLICY, 0, 0.02, 0.001),
    ],
)
def test_other_ends_say_nothing(ended: tuple[Reason, EndedBy, int, float, float]) -> None:
    resets = ResetsAtOnce()
    told(resets, SUSPICIOUS - 1)
    assert not resets.note(*ended)
    assert told(resets, 1) == 1


def test_a_far_endpoint_has_two_round_trips() -> None:
    resets = ResetsAtOnce()
    assert sum(resets.note(Reason.PEER_RST, EndedBy.SERVER, 0, 0.5, 0.3) for _ in range(SUSPICIOUS)) == 1
