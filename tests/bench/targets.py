"""What meshnet has to reach, in the same cell of the same run: test, mode, number of workers."""

from dataclasses import dataclass

from tests.bench.tests import CPU, MEMORY, MTLS, P99, PLAIN, RATE

BEST, ITSELF = "best peer", ""


@dataclass(frozen=True, slots=True)
class Target:
    """meshnet's figure by that of `of` is at most `limit`, or at least where more is better. `ITSELF`: the figure."""

    limit: float
    of: str = BEST


_PARITY = Target(1.0)

_TARGETS = {
    # test, figure: plain, mTLS
    ("rr1", CPU): (Target(0.9), Target(0.9)),
    ("rr32", CPU): (Target(0.9), Target(0.9)),
    ("rr64", CPU): (Target(0.9), Target(0.9)),
    ("stream1", CPU): (Target(0.9), Target(1.0)),
    ("stream8", CPU): (Target(0.9), Target(1.0)),
    ("crr", CPU): (Target(1.3), Target(0.3)),
    ("idle", MEMORY): (Target(8.0, ITSELF), Target(1.0, "envoy")),
    ("rr64", P99): (_PARITY, _PARITY),
}


def target(test: str, figure: str, mode: str) -> Target | None:
    """None where none was set: the best peer is still what the figure is held against."""
    if figure == RATE:
        return _PARITY
    plain_and_mtls = _TARGETS.get((test, figure))
    if plain_and_mtls is None or mode not in (PLAIN, MTLS):
        return None
    return plain_and_mtls[mode == MTLS]
