"""What is measured, and the figures that each test yields."""

from dataclasses import dataclass

RATE, CPU, MEMORY = "rate", "cpu", "memory"
P50, P90, P99, P999 = "p50_us", "p90_us", "p99_us", "p999_us"
OTHERS, STOLEN = "others", "stolen"  # noise: parts of the processors' time while a cell was measured

PLAIN, MTLS, SINGLE = "plain", "mtls", "single"
MODES = {
    PLAIN: "Plain",
    MTLS: "mTLS",
    SINGLE: "One sidecar, plain",
}
WORKERS = (1, 2)


@dataclass(frozen=True, slots=True)
class Figure:
    key: str
    label: str
    lower_is_better: bool = True


@dataclass(frozen=True, slots=True)
class Test:
    """`work` and `connections` are what the generator is asked for. `unit` is what CPU and rate are of."""

    name: str
    says: str
    work: str
    connections: int
    unit: str
    figures: tuple[Figure, ...]

    @property
    def held(self) -> bool:
        return self.work == "hold"

    @property
    def streams(self) -> bool:
        return self.work in ("stream", "bidi")


_LATENCY = (Figure(P50, "p50, us"), Figure(P90, "p90, us"), Figure(P99, "p99, us"), Figure(P999, "p99.9, us"))
_REQUESTS = (Figure(RATE, "requests/s", lower_is_better=False), *_LATENCY, Figure(CPU, "CPU us/request"))
_CONNECTIONS = (Figure(RATE, "connections/s", lower_is_better=False), *_LATENCY, Figure(CPU, "CPU us/connection"))
_BYTES = (Figure(RATE, "MB/s", lower_is_better=False), Figure(CPU, "CPU s/GB"))
_MEMORY = (Figure(MEMORY, "KiB/connection"),)

TESTS = {
    test.name: test
    for test in (
        Test("rr1", "256 B ping-pong, 1 connection", "rr", 1, "request", _REQUESTS),
        Test("rr32", "256 B ping-pong, 32 connections", "rr", 32, "request", _REQUESTS),
        Test("rr64", "256 B ping-pong, 64 connections", "rr", 64, "request", _REQUESTS),
        Test("stream1", "download, 1 connection", "stream", 1, "MB", _BYTES),
        Test("stream8", "download, 8 connections", "stream", 8, "MB", _BYTES),
        Test("bidi", "both ways at once, 1 connection", "bidi", 1, "MB", _BYTES),
        Test("crr", "connect, 256 B there and back, close; 8 at a time", "crr", 8, "connection", _CONNECTIONS),
        Test("idle", "1,000 idle connections", "hold", 1000, "connection", _MEMORY),
    )
}

# What --quick leaves out: rr64 says what rr32 does, one sidecar is a part of the way, and one connection keeps one
# worker busy.
_QUICK = {
    (PLAIN, 1): TESTS.keys() - {"rr32"},
    (MTLS, 1): TESTS.keys() - {"rr32"},
    (SINGLE, 1): {"rr64", "stream1", "crr"},
    (PLAIN, 2): {"rr64", "stream8", "crr"},
    (MTLS, 2): {"rr64", "stream8", "crr"},
}


def in_quick(test: Test, mode: str, workers: int) -> bool:
    return test.name in _QUICK.get((mode, workers), ())
