"""A storm of new connections, and the account of it: generator, metrics and log must agree on every one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from meshnet_cli.demo.mesh import Sidecar
from meshnet_cli.demo.world import wait_for
from tests.bench.growth.sidecars import LagWatch, Pair, pair
from tests.bench.growth.table import table
from tests.bench.load import Result
from tests.proxy import metrics

_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Account:
    """Connections since the sidecar started: metrics' count of those that ended, lines of the log, ids in them."""

    metrics: int
    lines: int
    ids: int

    def __sub__(self, other: "Account") -> "Account":
        return Account(self.metrics - other.metrics, self.lines - other.lines, self.ids - other.ids)


def storm(program: Path, modes: list[str], *, warm: float, seconds: float) -> tuple[str, list[str]]:
    """The table, and what does not agree."""
    head = (
        "mode",
        "connections",
        "per second",
        "CPU us/connection",
        "p99, ms",
        "lag, ms",
        "metrics (client's, server's)",
        "log (client's, server's)",
        "memory after it, KiB more",
    )
    rows, wrong = [], []
    for mode in modes:
        with pair(program, mode) as sidecars:
            _weather(sidecars, warm)
            memory = sidecars.memory()
            lag = LagWatch(sidecars)
            result, accounts = _weather(sidecars, seconds)
            worst = lag.worst()
            for sidecar, account in zip(sidecars.both, accounts, strict=True):
                if account != Account(result.opened, result.opened, result.opened):
                    wrong.append(f"{mode}, {sidecar.host.name}: {result.opened} connections, but {account}")
            rows.append(
                (
                    mode,
                    result.opened,
                    result.units / result.seconds,
                    result.cpu_seconds / result.units * 1e6,
                    result.p99_us / 1000,
                    worst,
                    " ".join(f"{account.metrics:,}" for account in accounts),
                    " ".join(f"{account.lines:,}" for account in accounts),
                    sidecars.memory() - memory,
                )
            )
    return table(head, rows), wrong


def _weather(sidecars: Pair, seconds: float) -> tuple[Result, list[Account]]:
    """Raises LoadFailed, and TimeoutError when a connection stays open, or without its line."""
    before = [_account(sidecar) for sidecar in sidecars.both]
    result = sidecars.run("crr", _AT_ONCE, seconds)

    def told() -> list[Account]:
        now = [_account(sidecar) - was for sidecar, was in zip(sidecars.both, before, strict=True)]
        return now if all(min(one.metrics, one.lines) >= result.opened for one in now) else []

    return result, wait_for(told, what="a record of every connection")


def _account(sidecar: Sidecar) -> Account:
    assert sidecar.process is not None
    whole, _, _ = sidecar.process.log.read_bytes().rpartition(b"\n")  # behind it may be half a line
    found = [_id(line) for line in whole.splitlines() if line.startswith(b"{")]
    ended = metrics.value(sidecar.host, "meshnet_tcp_connections_closed_total")
    return Account(int(ended), len(found), len(set(found)))


def _id(line: bytes) -> str:
    said: dict[str, Any] = msgspec.json.decode(line)
    return str(said["id"])
