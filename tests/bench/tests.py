"""What is measured, and the figures that each test yields."""

from dataclasses import dataclass

from tests.bench.figures import MTLS

RATE, P50, P99, CPU, MEMORY = "rate", "p50_us", "p99_us", "cpu", "memory"


@dataclass(frozen=True, slots=True)
class Figure:
    key: str
    label: str
    lower_is_better: bool = True


@dataclass(frozen=True, slots=True)
class Test:
    """`work` and `connections` are what load.c is asked for. `targets` are the most that CPU by HAProxy's may be."""

    name: str
    says: str
    work: str
    connections: int
    figures: tuple[Figure, ...]
    targets: dict[str, float]

    def target(self, mode: str, figure: Figure) -> float | None:
        return self.targets.get(mode) if figure.key == CPU else None


_LATENCY = (Figure(P50, "p50, us"), Figure(P99, "p99, us"))
_REQUESTS = (Figure(RATE, "requests/s", lower_is_better=False), *_LATENCY, Figure(CPU, "CPU us/request"))
_CONNECTIONS = (Figure(RATE, "connections/s", lower_is_better=False), *_LATENCY, Figure(CPU, "CPU us/connection"))
_BYTES = (Figure(RATE, "MB/s", lower_is_better=False), Figure(CPU, "CPU s/GB"))
_MEMORY = (Figure(MEMORY, "KiB/connection"),)
_REQUESTS_AT_MOST = {"plain": 3.0, MTLS: 3.0}
_BYTES_AT_MOST = {"plain": 1.5, MTLS: 1.5}

TESTS = {
    test.name: test
    for test in (
        Test("rr1", "256 B ping-pong, 1 connection", "rr", 1, _REQUESTS, _REQUESTS_AT_MOST),
        Test("rr32", "256 B ping-pong, 32 connections", "rr", 32, _REQUESTS, _REQUESTS_AT_MOST),
        Test("stream1", "download, 1 connection", "stream", 1, _BYTES, _BYTES_AT_MOST),
        Test("crr", "connect, 256 B there and back, close; 8 at a time", "crr", 8, _CONNECTIONS, {MTLS: 0.5}),
        Test("idle", "1,000 idle connections", "hold", 1000, _MEMORY, {}),
    )
}
