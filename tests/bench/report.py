"""The results as Markdown."""

from collections.abc import Mapping, Sequence

from tests.bench.figures import DIRECT, HAPROXY, MESHNET, Sample, Spread, chosen, ratio, spread, verdict
from tests.bench.tests import TESTS, Figure, Test

_TITLES = {"plain": "Plain", "mtls": "mTLS"}

_HOW = """\
Written by `scripts/bench --write`. Each subject runs in network namespaces of its own: client and sidecar on one host,
sidecar and server on another, a bridge between; client and server are the same C program everywhere (`load.c`).
Median [least..most] of the rounds; the subjects take turns within each round, and the ratio is taken round by round.
CPU is user and system time of both sidecars, without the client, the server and the kernel's own threads. A verdict
needs every round on one side of the target (without a target: of 1); otherwise it is *too noisy*.

- HAProxy: `mode tcp`, one thread, otherwise its defaults (no `splice-auto`). The client dials HAProxy's port on
  127.0.0.1: HAProxy does not look up redirected connections' destination, meshnet does so for each.
- mTLS: TLS 1.3, P-256, certificates of the same authority, verified on both sides; HAProxy may resume sessions, and
  does not check SPIFFE ids, meshnet does. meshnet reuses tunnels. Checked before measuring: a client without a
  certificate is refused.
- plain: the endpoint's sidecar takes the connection in plain text; nothing is encrypted on either subject.
- meshnet writes its access log (JSON, one line a connection a side), HAProxy writes none.
- Memory is what the two sidecars' PSS grows by, freshly started, over 1,000 connections, opened 16 at a time, that
  have each had one request answered. Buffers in the kernel are not in it.
- Any error (a reset, a wrong byte, an end that does not come) fails its cell; a failed cell has no figures.
"""


def markdown(samples: Sequence[Sample], machine: Mapping[str, str]) -> str:
    """The whole of RESULTS.md."""
    modes = [mode for mode in _TITLES if any(sample.mode == mode for sample in samples)]
    parts = ["# meshnet and HAProxy", _HOW, "\n".join(f"- {name}: {value}" for name, value in machine.items())]
    for mode in reversed(modes):
        parts.append(f"\n## {_TITLES[mode]}\n")
        parts.append(_table(samples, mode))
    failures = [sample for sample in samples if sample.failure]
    if failures:
        parts.append("\n## Failed\n")
        parts += [
            f"- {sample.test} {sample.peer} {sample.mode} in round {sample.round}: {sample.failure}"
            for sample in failures
        ]
    return "\n".join(parts) + "\n"


def _table(samples: Sequence[Sample], mode: str) -> str:
    rows = [
        "| test | figure | direct | HAProxy | meshnet | meshnet / HAProxy | target | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for test in TESTS.values():
        if any(sample.test == test.name for sample in samples):
            rows += [_row(samples, test, figure, mode) for figure in test.figures]
    return "\n".join(rows)


def _row(samples: Sequence[Sample], test: Test, figure: Figure, mode: str) -> str:
    theirs = chosen(samples, test.name, HAPROXY, mode)
    ours = chosen(samples, test.name, MESHNET, mode)
    seen = ratio(ours, theirs, figure.key)
    target = test.target(mode, figure)
    cells = [
        f"**{test.name}** {test.says}" if figure is test.figures[0] else "",
        figure.label,
        _cell(chosen(samples, test.name, DIRECT, ""), figure),
        _cell(theirs, figure),
        _cell(ours, figure),
        _spread(seen) if seen else "-",
        "" if target is None else f"at most {target:g}",
        str(verdict(seen, target, lower_is_better=figure.lower_is_better)) if seen else "-",
    ]
    return f"| {' | '.join(cells)} |"


def _cell(cell: Sequence[Sample], figure: Figure) -> str:
    if any(sample.failure for sample in cell):
        return "failed"
    seen = spread(cell, figure.key)
    return _spread(seen) if seen else "-"


def _spread(seen: Spread) -> str:
    return f"{number(seen.median)} [{number(seen.least)}..{number(seen.most)}]"


def number(value: float) -> str:
    """Three digits that count: 12,300 or 123 or 1.23."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:.3g}"
