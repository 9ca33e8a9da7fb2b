"""Those that are accepted at the tunnel port and have not proven yet who they are: anybody may come there."""

from types import TracebackType

import trio

MOST = 512
"""At once; each has a descriptor and some fifty KiB for its handshake. The others wait in the kernel."""

_TIMEOUT, _CROWDED_TIMEOUT = 5.0, 1.0  # seconds for a handshake; the second when half of the room is taken


class Arrivals:
    """A context manager around each handshake; `under_way` counts them."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self.under_way = 0
        self._one_left = trio.Event()

    def __enter__(self) -> None:
        self.under_way += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.under_way -= 1
        self._one_left.set()

    @property
    def timeout(self) -> float:
        """Seconds that one which begins now may take. Who says nothing shall not hold up the others for long."""
        return _TIMEOUT if self.under_way <= self._most // 2 else _CROWDED_TIMEOUT

    async def room(self) -> int:
        """For how many there is room, as soon as there is some."""
        while self.under_way >= self._most:
            self._one_left = trio.Event()
            await self._one_left.wait()
        return self._most - self.under_way
