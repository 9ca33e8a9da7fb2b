"""The relay that always works: Python, an epoll in each thread, and no task of trio on the way of a byte.

Links begin in trio's own thread (young.py), and those that live on move to relay threads (thread.py). Read on in
loop.py, pair.py (the life of a link), plain.py and tunnel.py (the two kinds of legs).
"""

import functools
import socket
from collections.abc import Callable
from typing import Self

import trio

from meshnet.model.address import Address
from meshnet.model.connection import Direction
from meshnet.net import sockets
from meshnet.net.python_tls import PythonChannel, PythonTls
from meshnet.net.strand import in_task
from meshnet.relay import SILENCE, Flow, Issuer, Link, Order, Outcome, PlainLeg, Tally, Target, Through
from meshnet.relay.python.pair import Pair
from meshnet.relay.python.thread import RelayThread
from meshnet.relay.python.young import YOUNG_EVENTS, YoungLoop, wake_tasks


class PythonRelay:
    """Use as an async context manager, or call `start` and `close`; both belong to the trio thread."""

    name = "python"
    takes_orders = False  # to decide once for many connections pays only where the rest is not Python's work either

    def __init__(self, threads: int = 1, *, young_events: int = YOUNG_EVENTS, silence: float = SILENCE) -> None:
        """`silence`: see meshnet.relay."""
        self.tls = PythonTls()
        self._count = threads
        self._young_events = young_events
        self._silence = silence
        self._threads: list[RelayThread] = []
        self._young: YoungLoop | None = None

    def start(self) -> None:
        token = trio.lowlevel.current_trio_token()

        def ended(pairs: list[Pair]) -> None:
            try:
                token.run_sync_soon(wake_tasks, pairs)
            except trio.RunFinishedError:
                pass  # nobody is left who could ask how it went

        self._threads = [RelayThread(f"relay-{number}", ended, self._silence) for number in range(self._count)]
        for thread in self._threads:
            thread.start()
        self._young = YoungLoop(self._idlest_thread, self._young_events, self._silence)
        trio.lowlevel.spawn_system_task(self._young.run)
        trio.lowlevel.spawn_system_task(self._young.look_forever)

    def close(self) -> None:
        """Ends the threads; links still running are reset, with no wait for a tunnel's peer."""
        if self._young is not None:
            self._young.close()
            self._young = None
        for thread in self._threads:
            thread.stop()
        for thread in self._threads:
            thread.join()
        self._threads = []

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def fits(self, link: Link) -> bool:
        legs = (link.client, link.endpoint)
        tunnels = [leg for leg in legs if not isinstance(leg, PlainLeg)]
        return len(tunnels) < 2 and all(isinstance(leg.channel, PythonChannel) for leg in tunnels)

    async def run(self, link: Link, tally: Tally) -> Outcome:
        """See meshnet.relay.Relay. Raises RuntimeError when the relay has not been started."""
        young = self._young
        if young is None:
            raise RuntimeError("the relay is not started")
        await in_task()
        pair = Pair(young, link, tally, trio.lowlevel.current_task())
        if not young.begin(pair):
            return pair.result()
        link.abort = functools.partial(young.cancel, pair)

        def cancel(raise_cancel: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
            pair.raise_cancel = raise_cancel
            young.cancel(pair)
            return trio.lowlevel.Abort.FAILED

        result: Outcome = await trio.lowlevel.wait_task_rescheduled(cancel)
        return result

    async def accept_forever(
        self,
        listener: socket.socket,
        direction: Direction,
        carry: Callable[[socket.socket, Address], object],
        *,
        shared: bool,
    ) -> None:
        """See meshnet.relay.Relay."""
        await sockets.accept_forever(listener, carry)

    def order(self, flow: Flow, target: Target, places: int, issuer: Issuer, through: Through | None = None) -> Order:
        raise NotImplementedError("this relay takes no orders")

    def suspend_orders(self) -> None:
        """There are none."""

    def catch_up(self) -> None:
        """Nobody is ever behind."""

    def _idlest_thread(self) -> RelayThread:
        return min(self._threads, key=lambda thread: len(thread.pairs))
