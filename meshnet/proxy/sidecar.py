"""What runs in each process of a sidecar: it accepts, follows the mesh, and drains when it is to end."""

import gc
import logging
import resource
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import partial

import trio

from meshnet.errors import CommandError, EndedBy, Reason
from meshnet.model.address import Address
from meshnet.model.connection import Direction
from meshnet.model.duration import parse_duration
from meshnet.model.settings import Settings
from meshnet.model.snapshot import Snapshot
from meshnet.net import sockets
from meshnet.net.addresses import LocalAddresses
from meshnet.net.strand import Strands
from meshnet.proxy import inbound, outbound
from meshnet.proxy.held import HeldClient, HeldSyns
from meshnet.proxy.identity import Identity
from meshnet.proxy.in_force import MeshInForce
from meshnet.proxy.lag import LoopLag
from meshnet.proxy.listen import Listeners
from meshnet.proxy.log import AccessLog, access_format
from meshnet.proxy.metrics import Metrics
from meshnet.proxy.record import Record
from meshnet.proxy.registry import Registry
from meshnet.proxy.standing_order import Before, fail
from meshnet.proxy.state import ProxyState
from meshnet.proxy.upkeep import Upkeep
from meshnet.relay.ladder import best_relay
from meshnet.tunnel.pool import Pool

_log = logging.getLogger("meshnet.proxy")

_LAST_CALL = 0.05  # seconds for what was accepted at the last moment to begin its record
# Seconds. With Python's 5 ms a relay thread waits 9 ms (median) for its turn while trio is busy; with this, 0.7 ms.
_SWITCH_INTERVAL = 0.0005
_LAST_SECONDS = 5  # for the process to end when it has failed
_LAST_RECORDS = 2.0  # seconds for aborted connections to end properly

Carry = Callable[[socket.socket, Address, ProxyState], Awaitable[None]]


@asynccontextmanager
async def a_sidecar(
    settings: Settings,
    listeners: Listeners,
    *,
    id_suffix: str = "",
    log_lock: int | None = None,
    ticket_secret: bytes = b"",
) -> AsyncIterator["Sidecar"]:
    """One that is about to serve.

    Workers have a suffix for their ids, a lock between their access logs, and a secret for each other's TLS sessions.
    """
    _allow_many_descriptors()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    form = access_format(settings.log.access)
    metrics = Metrics()
    mark = settings.proxy.mark if sockets.can_mark(settings.proxy.mark) else 0
    if not mark:
        _log.warning("SO_MARK is not permitted: only the group %d keeps our traffic out", settings.capture.gid)
    if settings.capture.original_source and not (mark and sockets.can_be_transparent()):
        raise CommandError(
            "cannot speak to applications in their clients' names",
            why="capture.original_source needs the capability NET_ADMIN or NET_RAW",
            fix="give it, or set capture.original_source = false",
            code=5,
        )
    with ExitStack() as stack:
        log = stack.enter_context(AccessLog(form, lock=log_lock)) if form != "off" else None
        async with best_relay(settings.proxy.relay, settings.proxy.relay_threads, ticket_secret, id_suffix) as relays:
            identity = Identity(settings.identity, relays.tls)
            identity.refresh()
            pool = Pool(
                lambda: identity.credentials,
                relays.tls,
                mark=mark,
                idle_timeout=parse_duration(settings.pool.idle_timeout),
                max_idle=settings.pool.max_idle,
            )
            pool.on_handshake = metrics.handshake
            state = ProxyState(
                settings,
                Snapshot(version=0),
                identity=identity,
                metrics=metrics,
                registry=Registry(
                    memory=(settings.admin.memory_mib << 20) // settings.proxy.workers,
                    observer=metrics,
                    log=log,
                    id_suffix=id_suffix,
                ),
                relays=relays,
                pool=pool,
                addresses=stack.enter_context(LocalAddresses()),
                mark=mark,
            )
            metrics.state = state
            yield Sidecar(state, listeners)


def _allow_many_descriptors() -> None:
    """A connection takes two to three; the soft limit of 1024 is there for programs that call select(2)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Sidecar:
    def __init__(self, state: ProxyState, listeners: Listeners) -> None:
        self.state = state
        self._listeners = listeners
        self._drain_within: float | None = None
        self._drain_asked = trio.Event()
        self._first_look = trio.Event()
        self._last_call = trio.Event()
        self._lag = LoopLag(note=state.metrics.lag.add)
        self._reload, self._reloads = trio.open_memory_channel[None](1)

    async def serve(self) -> None:
        """Until it has been asked to drain, and has drained."""
        state = self.state
        async with trio.open_nursery() as nursery:
            nursery.start_soon(MeshInForce(state, self._first_look.set).run, self._reloads)
            nursery.start_soon(state.identity.watch, self._renewed)
            nursery.start_soon(state.pool.run)
            nursery.start_soon(state.orders.run)
            nursery.start_soon(Upkeep(state).run)
            nursery.start_soon(state.checks.run)
            nursery.start_soon(self._lag.run)
            nursery.start_soon(self._end_surely)
            strands = Strands(nursery)
            nursery.start_soon(self._follow_addresses)
            state.registry.catch_up = state.relays.catch_up
            state.orders.go_on = self._goer_on(strands)
            carries: dict[str, tuple[Carry, Direction | None]] = {
                "outbound": (outbound.carry, Direction.OUTBOUND),
                "inbound": (inbound.carry_plain, Direction.INBOUND),
                "tunnel": (inbound.serve_tunnel, None),
            }
            for name, (carry, direction) in carries.items():
                nursery.start_soon(self._accept, self._listeners[name], direction, self._starter(strands, carry))
            if state.held is not None:
                nursery.start_soon(self._hold, state.held, strands)
            # What is alive now stays: the collector need not look at it again with every connection's garbage.
            gc.collect()
            gc.freeze()
            gc.set_threshold(50_000, 20, 100)
            await self._drain_asked.wait()
            await self._drain()
            strands.close()
            nursery.cancel_scope.cancel()

    async def _end_surely(self) -> None:
        """When something else here fails, the process ends within seconds, and whoever looks after it starts another.

        Without memory, which it mostly is, what is cancelled may never get to know of it. An alarm needs none.
        """
        try:
            await trio.sleep_forever()
        finally:
            if not self.is_to_end:
                signal.alarm(_LAST_SECONDS)

    @property
    def is_to_end(self) -> bool:
        """Whether it has been asked to drain."""
        return self._drain_asked.is_set()

    def ask_drain(self, timeout: float) -> None:
        """A second request, say an impatient Ctrl-C, ends the drain at once."""
        self._drain_within = timeout if self._drain_within is None else 0.0
        self._drain_asked.set()

    def stop_accepting(self) -> None:
        """Takes those that wait, and closes the listeners."""
        self._first_look.set()
        self._last_call.set()

    def reload(self) -> None:
        try:
            self._reload.send_nowait(None)
        except trio.WouldBlock:
            pass  # the files are about to be read anyway

    async def _accept(
        self,
        listeners: Sequence[socket.socket],
        direction: Direction | None,
        start: Callable[[socket.socket, Address], None],
    ) -> None:
        """`direction`: of the applications' connections that come here; None: peers' tunnels do."""
        # Who comes before the mesh is known waits in the kernel: nothing is known to be meshed, or denied, until then.
        await self._first_look.wait()
        shared = self.state.settings.proxy.workers > 1
        async with trio.open_nursery() as nursery:
            for sock in listeners:
                if direction is None:
                    nursery.start_soon(sockets.accept_forever, sock, start, self.state.arrivals.room)
                else:
                    accept = partial(self.state.relays.available[0].accept_forever, shared=shared)
                    nursery.start_soon(accept, sock, direction, start)
            await self._last_call.wait()
            nursery.cancel_scope.cancel()

    async def _hold(self, held: HeldSyns, strands: Strands) -> None:
        # As in `_accept`: until the mesh is known SYNs pass, and wait at the listener.
        await self._first_look.wait()

        def begin(client: HeldClient) -> None:
            if strands.closed:
                held.finish(client, Reason.DRAIN)
            else:
                strands.start(carry_one(client))

        async def carry_one(client: HeldClient) -> None:
            try:
                await outbound.carry_held(client, held, self.state)
            except Exception:
                _log.exception("a connection from %s failed inside the proxy", client.syn.source)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(held.run, begin)
            await self._last_call.wait()
            nursery.cancel_scope.cancel()

    def _starter(self, strands: Strands, carry: Carry) -> Callable[[socket.socket, Address], None]:
        state = self.state

        async def carry_one(sock: socket.socket, peer: Address) -> None:
            try:
                await carry(sock, peer, state)
            except Exception:
                # A record ends by itself; what gets here is outside of one, and must not take the others along.
                _log.exception("a connection from %s failed inside the proxy", peer)
                sock.close()

        def start(sock: socket.socket, peer: Address) -> None:
            if strands.closed:
                sock.close()
            else:
                strands.start(carry_one(sock, peer))

        return start

    def _goer_on(self, strands: Strands) -> Callable[[Record, Before], None]:
        state = self.state

        def go_on(record: Record, before: Before) -> None:
            if strands.closed:
                fail(record, before)
            else:
                strands.start(outbound.carry_on(record, before, state))

        return go_on

    async def _drain(self) -> None:
        """New connections are still taken until none is open, or in time; then the last ones may end too."""
        state = self.state
        state.draining = True
        state.orders.stop()
        state.pool.close_idle()
        for tunnel in state.tunnels:
            tunnel.go_away()
        started = time.monotonic()
        await self._until_none_is_open(started)
        self._last_call.set()
        await trio.sleep(_LAST_CALL)
        await self._until_none_is_open(started)
        state.registry.catch_up()
        left = len(state.registry.open)
        if left:
            _log.warning("%d connections did not end in time and are reset", left)
            state.registry.abort_all(Reason.DRAIN, EndedBy.DRAIN)
            with trio.move_on_after(_LAST_RECORDS):
                await state.registry.empty.wait()

    async def _until_none_is_open(self, started: float) -> None:
        state = self.state
        while (state.registry.open or state.orders.are_busy) and time.monotonic() - started < (
            self._drain_within or 0.0
        ):
            with trio.move_on_after(0.1):
                await state.registry.empty.wait()
            if not state.registry.open:
                await trio.sleep(_LAST_CALL)

    async def _follow_addresses(self) -> None:
        addresses = self.state.addresses
        while True:
            await trio.lowlevel.wait_readable(addresses.fileno())
            addresses.forget()

    def _renewed(self) -> None:
        self.state.orders.suspend_all()
        self.state.metrics.renewals += 1
        self.state.pool.renew()
        for tunnel in list(self.state.tunnels):
            tunnel.renewed(self.state)
