"""The results as Markdown."""

from collections.abc import Mapping, Sequence
from itertools import groupby

import msgspec

from tests.bench.figures import Cell, Sample, Spread, verdict
from tests.bench.table import DIRECT, PEERS, SUBJECTS, Row, rows
from tests.bench.targets import ITSELF
from tests.bench.tests import MODES, TESTS

_HOW = """\
Written by `scripts/bench --write`. Each subject runs in network namespaces of its own: client and sidecar on one host,
sidecar and server on another, a bridge between; client and server are the same C program everywhere (`generator/`).
The subjects of a cell (a test, a mode, a number of workers) take turns within each round. Figures are the median
[least..most] of the rounds. The ratio is meshnet's figure by the best peer's, round by round; best is who has the best
median of that figure in that cell. CPU is user and system time of all sidecars, without the client, the server and the
kernel's own threads. A verdict needs every round on one side of the target (without a target: of 1); otherwise it is
*too noisy*.

- Before measuring, each subject answers a request from end to end. With mTLS, plain text, a client without a
  certificate, and one with a certificate of another authority are refused, and one with a good certificate is served.
- HAProxy (`mode tcp`), nginx (`stream`) and Envoy (`tcp_proxy`) run with their defaults for buffers. The client dials
  their port on 127.0.0.1; meshnet takes redirected connections, and looks up where each was going. *HAProxy,
  splice* has `option splice-request` and `splice-response`, for streams in plain text (`splice-auto` alone hardly
  splices).
- mTLS: TLS 1.3, P-256, certificates of one authority, verified on both sides, AES-128-GCM for the peers; they may
  resume sessions. HAProxy and nginx send the issuer with the leaf, Envoy the leaf alone. Envoy and meshnet check
  SPIFFE ids. meshnet reuses tunnels.
- *nginx, redirected* is nginx behind the rules that meshnet has: what capture costs anybody, in the kernel's connection
  tracking and address translation. It is no peer in the ratios.
- One sidecar, plain: that of the client; it dials the server itself.
- Both ways: bytes that came and bytes that went, both counted at the client.
- p99 takes 1,000 units in each round, p99.9 10,000: where there were fewer there is no figure.
- Others' use of the processors is what `/proc/stat` shows beyond our own processes; *stolen* is the hypervisor's.
- meshnet writes its access log (JSON, one line a connection a side), the peers write none.
- Memory is what the sidecars' PSS grows by, freshly started, over 1,000 connections, opened 16 at a time, that have
  each had one request answered. Buffers in the kernel are not in it.
- Any error (a reset, a wrong byte, an end that does not come) fails its cell; a failed cell has no figures.
"""


class Run(msgspec.Struct, frozen=True):
    """All that was measured under one set of circumstances, which `machine` tells."""

    title: str
    time: int  # which time of it, from 1
    machine: dict[str, str]
    samples: list[Sample]


def markdown(times: Sequence[Sequence[Run]]) -> str:
    """The whole of RESULTS.md: what all times say together, and the last of them in full."""
    parts = ["# meshnet and its peers", _HOW]
    if len(times) > 1:
        parts += [f"## All {len(times)} times\n", *_all_times(times), ""]
    for run in times[-1]:
        title = f"{run.title}, the last time" if len(times) > 1 else run.title
        parts += [f"## {title}\n", *_run(run.machine, run.samples), ""]
    return "\n".join(parts)


def _all_times(times: Sequence[Sequence[Run]]) -> list[str]:
    """Every figure with a target: the median ratio of each time, one column for each set of circumstances."""
    lines = [
        "The median ratio of each time, [least..most] of the rounds of all times, and the verdict on all these rounds:",
        "as within one time, it needs every one of them on one side of the target.\n",
    ]
    lines += [f"- {run.title}: {run.machine.get('quiet', '')}" for runs in times for run in runs]
    titles = [run.title for run in times[0]]
    lines += [f"\n| cell | figure | target | {' | '.join(titles)} |", "|---" * (3 + len(titles)) + "|"]
    parts = [[{(row.cell, row.figure): row for row in rows(run.samples)} for run in runs] for runs in times]
    for key, row in parts[0][0].items():
        if row.target:
            seen = [[tables[part].get(key) for tables in parts] for part in range(len(titles))]
            cells = [_title(row.cell), row.label, row.target, *map(_together, seen)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _together(seen: Sequence[Row | None]) -> str:
    ratios = [row.ratio for row in seen if row and row.ratio]
    row = seen[0]
    if row is None or len(ratios) < len(seen):
        return "-"
    rounds = Spread.together(ratios)
    said = verdict(rounds, row.limit, lower_is_better=row.lower_is_better)
    medians = ", ".join(number(ratio.median) for ratio in ratios)
    return f"{medians} {_range(rounds)}: {said}"


def _run(machine: Mapping[str, str], samples: Sequence[Sample]) -> list[str]:
    parts = [f"- {name}: {value}" for name, value in machine.items()]
    table = rows(samples)
    aims = [row for row in table if row.target]
    if aims:
        parts += ["\n### Targets\n", *_targets(aims)]
    for (mode, workers), group in groupby(table, key=lambda row: (row.cell.mode, row.cell.workers)):
        parts += [f"\n### {MODES[mode]}, {_workers(workers)}\n", *_details(list(group))]
    failures = [sample for sample in samples if sample.failure]
    if failures:
        parts.append("\n### Failed\n")
        parts += [
            f"- {one.cell.test} {one.peer} {one.cell.mode} {_workers(one.cell.workers)} in round {one.round}: "
            f"{one.failure}"
            for one in failures
        ]
    return parts


def _targets(aims: Sequence[Row]) -> list[str]:
    lines = ["| cell | figure | meshnet | held against | ratio | target | verdict |", "|---|---|---|---|---|---|---|"]
    for row in aims:
        theirs = row.seen.get(row.against)
        cells = [
            _title(row.cell),
            row.label,
            _cell(row, "meshnet"),
            f"{SUBJECTS[row.against]} {number(theirs.median)}" if theirs else "-",
            "" if row.against == ITSELF else _ratio(row),
            row.target,
            _verdict(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _details(group: Sequence[Row]) -> list[str]:
    shown = [name for name in SUBJECTS if any(name in row.seen or name in row.missing for row in group)]
    names = [*(SUBJECTS[name] for name in shown), "ratio", "verdict"]
    lines = [f"| test | figure | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for row in group:
        test = TESTS[row.cell.test]
        cells = [
            f"**{test.name}** {test.says}" if row.figure == test.figures[0].key else "",
            row.label,
            *(_cell(row, name) for name in shown),
            f"{_ratio(row)} ({SUBJECTS[row.against]})" if row.ratio and row.against in PEERS else "-",
            _verdict(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(row: Row, name: str) -> str:
    seen = row.seen.get(name)
    return _spread(seen) if seen else row.missing.get(name, "-")


def _ratio(row: Row) -> str:
    return _spread(row.ratio) if row.ratio else "-"


def _verdict(row: Row) -> str:
    return str(row.verdict) if row.verdict else "-"


def _title(cell: Cell) -> str:
    return f"{cell.test} {cell.mode}, {_workers(cell.workers)}"


def _workers(count: int) -> str:
    return "one worker" if count == 1 else "two workers" if count == 2 else DIRECT


def _spread(seen: Spread) -> str:
    return f"{number(seen.median)} {_range(seen)}"


def _range(seen: Spread) -> str:
    return f"[{number(seen.least)}..{number(seen.most)}]"


def number(value: float) -> str:
    """Three digits that count: 12,300 or 123 or 1.23."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:.3g}"
