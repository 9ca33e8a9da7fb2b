"""One line a step, with the time it took; what went wrong is told below it."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_WIDTH = 58


class Steps:
    def __init__(self) -> None:
        self.done = 0
        self._started = time.monotonic()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        except BaseException:
            self._tell("✗", name, started)
            raise
        self.done += 1
        self._tell("✓", name, started)

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def _tell(self, mark: str, name: str, started: float) -> None:
        print(f"{mark} {name:<{_WIDTH}} {time.monotonic() - started:6.1f}s", flush=True, file=sys.stdout)
