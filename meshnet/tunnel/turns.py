"""Turns at making handshakes: few at once, and fair to whoever waits for one."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from meshnet.net.strand import in_task
from meshnet.tunnel.client import ClientTunnel, Key, no_turn


@dataclass(slots=True, eq=False)
class _Waiter:
    key: Key
    turn: trio.Event = field(default_factory=trio.Event)
    tunnel: ClientTunnel | None = None


class Turns:
    """`most` at once. A tunnel that comes back while somebody waits for one to that peer saves a turn.

    `keep` gets a tunnel whose taker has gone.
    """

    def __init__(self, most: int, keep: Callable[[ClientTunnel], None]) -> None:
        self._most = self._free = most
        self._keep = keep
        self._waiting: OrderedDict[Key, OrderedDict[_Waiter, None]] = OrderedDict()  # by peer, in the order they came

    @property
    def taken(self) -> int:
        return self._most - self._free

    @property
    def is_free(self) -> bool:
        """Whether the next one need not wait."""
        return self._free > 0

    @property
    def waiting(self) -> int:
        """Any thread may ask."""
        return sum(map(len, list(self._waiting.values())))

    async def wait(self, key: Key, patience: float) -> ClientTunnel | None:
        """A turn (None; owes one `end`), or a tunnel that was offered instead.

        Raises ConnectionFailed(limit.queue_timeout) after `patience` seconds.
        """
        if self._free:
            self._free -= 1
            return None
        waiter = _Waiter(key)
        self._waiting.setdefault(key, OrderedDict())[waiter] = None
        try:
            await in_task()
            with trio.move_on_after(patience):
                await waiter.turn.wait()
            if waiter.turn.is_set():
                return waiter.tunnel
        except trio.Cancelled:
            if waiter.tunnel is not None:
                self._keep(waiter.tunnel)
            elif waiter.turn.is_set():
                self.end()
            raise
        finally:
            self._forget(waiter)
        raise no_turn(key, patience)

    def take_if_idle(self) -> bool:
        """A turn for what nobody waits for, while half of them are free; owes one `end`."""
        if self._free <= self._most // 2:
            return False
        self._free -= 1
        return True

    def end(self) -> None:
        """The peers in turn, so that a burst to one does not hold up another; for each, first come, first served."""
        if not self._waiting:
            self._free += 1
            return
        key, waiters = next(iter(self._waiting.items()))
        self._waiting.move_to_end(key)
        self._call(next(iter(waiters)))

    def offer(self, tunnel: ClientTunnel) -> bool:
        """Whether somebody was waiting for it, and has it now."""
        waiters = self._waiting.get(tunnel.key)
        if waiters is None:
            return False
        waiter = next(iter(waiters))
        waiter.tunnel = tunnel
        self._call(waiter)
        return True

    def _call(self, waiter: _Waiter) -> None:
        self._forget(waiter)
        waiter.turn.set()

    def _forget(self, waiter: _Waiter) -> None:
        waiters: OrderedDict[_Waiter, None] = self._waiting.get(waiter.key, OrderedDict())
        waiters.pop(waiter, None)
        if not waiters:
            self._waiting.pop(waiter.key, None)
