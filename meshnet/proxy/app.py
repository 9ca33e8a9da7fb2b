"""The sidecar as a process: what starts in which order, what runs beside the connections, and how it ends."""

import gc
import logging
import resource
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack

import trio
from msgspec import structs

from meshnet.errors import CommandError, ConfigError, ConnectionFailed, EndedBy, Reason
from meshnet.model.address import Address
from meshnet.model.connection import Direction
from meshnet.model.duration import parse_duration
from meshnet.model.settings import Settings
from meshnet.model.snapshot import Snapshot
from meshnet.net import sockets
from meshnet.net.addresses import LocalAddresses
from meshnet.net.strand import Strands
from meshnet.proxy import follow, inbound, last_good, orders, outbound
from meshnet.proxy.admin import AdminServer, admin_listener
from meshnet.proxy.health import HealthServer
from meshnet.proxy.identity import Identity
from meshnet.proxy.lag import LoopLag
from meshnet.proxy.log import AccessLog, access_format
from meshnet.proxy.metrics import Metrics
from meshnet.proxy.record import Record
from meshnet.proxy.registry import Registry
from meshnet.proxy.state import ProxyState
from meshnet.proxy.status import count_services
from meshnet.relay.ladder import best_relay
from meshnet.tunnel.pool import Pool

_log = logging.getLogger("meshnet.proxy")

_LOOPBACK = ("127.0.0.1", "::1")  # redirected output arrives there (man iptables-extensions, REDIRECT)
_ANY = ("0.0.0.0", "::")  # redirected input arrives at the address of the interface it came in by
_REAP_EVERY = 5.0  # seconds
_LAST_CALL = 0.05  # seconds for what was accepted at the last moment to begin its record
# Seconds. With Python's 5 ms a relay thread waits 9 ms (median) for its turn while trio is busy; with this, 0.7 ms.
_SWITCH_INTERVAL = 0.0005
_LAST_RECORDS = 2.0  # seconds for aborted connections to end properly

Carry = Callable[[socket.socket, Address, ProxyState], Awaitable[None]]


async def run(settings: Settings) -> None:
    """Runs a sidecar until SIGTERM or SIGINT and the drain that follows. Raises CommandError if it cannot start."""
    _allow_many_descriptors()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    form = access_format(settings.log.access)
    metrics = Metrics()
    mark = settings.proxy.mark if sockets.can_mark(settings.proxy.mark) else 0
    if not mark:
        _log.warning("SO_MARK is not permitted: only the group %d keeps our traffic out", settings.capture.gid)
    with ExitStack() as stack:
        log = stack.enter_context(AccessLog(form)) if form != "off" else None
        async with best_relay(settings.proxy.relay, settings.proxy.relay_threads) as relays:
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
                registry=Registry(keep=settings.admin.recent, observer=metrics, log=log),
                relays=relays,
                pool=pool,
                addresses=stack.enter_context(LocalAddresses()),
                mark=mark,
            )
            metrics.state = state
            await _Sidecar(state, stack).serve()


def _guarded(handle: Callable[[trio.SocketStream], Awaitable[None]]) -> Callable[[trio.SocketStream], Awaitable[None]]:
    """A bug in answering one question must not end the sidecar."""

    async def answer(stream: trio.SocketStream) -> None:
        try:
            await handle(stream)
        except Exception:
            _log.exception("a request to the sidecar itself failed")

    return answer


def _allow_many_descriptors() -> None:
    """A connection takes two to three; the soft limit of 1024 is there for programs that call select(2)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Sidecar:
    def __init__(self, state: ProxyState, stack: ExitStack) -> None:
        self._state = state
        self._stack = stack
        self._listeners: dict[str, str] = {}
        self._drain_within: float | None = None
        self._drain_asked = trio.Event()
        self._first_look = trio.Event()
        self._last_call = trio.Event()
        self._lag = LoopLag()
        state.metrics.lag = lambda: self._lag.last
        self._reload, self._reloads = trio.open_memory_channel[None](1)

    async def serve(self) -> None:
        state, proxy = self._state, self._state.settings.proxy
        outbound_sockets = self._listen("outbound", proxy.outbound_port, _LOOPBACK)
        inbound_sockets = self._listen("inbound", proxy.inbound_port, _ANY)
        tunnel_sockets = self._listen("tunnel", proxy.tunnel_port, _ANY)
        admin = state.settings.admin
        health_sockets = self._listen("health", admin.health_port, (admin.health_address,))
        health = [trio.SocketListener(trio.socket.from_stdlib_socket(sock)) for sock in health_sockets]
        try:
            async with admin_listener(admin.socket) as admin_socket, trio.open_nursery() as nursery:
                self._listeners["admin"] = admin.socket
                nursery.start_soon(self._signals)
                nursery.start_soon(self._follow)
                nursery.start_soon(state.identity.watch, self._renewed)
                nursery.start_soon(self._reap)
                nursery.start_soon(self._lag.run)
                strands = Strands(nursery)
                server = AdminServer(state, self._listeners, self._ask_drain)
                nursery.start_soon(trio.serve_listeners, _guarded(server.handle), [admin_socket])
                nursery.start_soon(trio.serve_listeners, _guarded(HealthServer(state, state.metrics).handle), health)
                nursery.start_soon(self._follow_addresses)
                state.registry.catch_up = state.relays.catch_up
                state.orders.go_on = self._goer_on(strands)
                for carry, found, direction in (
                    (outbound.carry, outbound_sockets, Direction.OUTBOUND),
                    (inbound.carry_plain, inbound_sockets, Direction.INBOUND),
                    (inbound.serve_tunnel, tunnel_sockets, None),
                ):
                    nursery.start_soon(self._accept, found, direction, self._starter(strands, carry))
                # What is alive now stays: the collector need not look at it again with every connection's garbage.
                gc.collect()
                gc.freeze()
                gc.set_threshold(50_000, 20, 100)
                _log.info("listening: %s", ", ".join(self._listeners.values()))
                await self._drain_asked.wait()
                await self._drain()
                strands.close()
                nursery.cancel_scope.cancel()
        except PermissionError as error:
            raise CommandError(
                f"cannot listen at {admin.socket}: {error.strerror}",
                why="the folder belongs to somebody else",
                fix="sudo meshnet proxy",
                code=5,
            ) from error
        except OSError as error:
            raise CommandError(
                f"cannot listen at {admin.socket}: {error.strerror}",
                why="another sidecar may be running here",
                fix="meshnet status",
            ) from error

    async def _accept(
        self,
        listeners: list[socket.socket],
        direction: Direction | None,
        start: Callable[[socket.socket, Address], None],
    ) -> None:
        """`direction`: of the applications' connections that come here; None: peers' tunnels do."""
        # Who comes before the mesh is known waits in the kernel: nothing is known to be meshed, or denied, until then.
        await self._first_look.wait()
        async with trio.open_nursery() as nursery:
            for sock in listeners:
                if direction is None:
                    nursery.start_soon(sockets.accept_forever, sock, start)
                else:
                    nursery.start_soon(self._state.relays.available[0].accept_forever, sock, direction, start)
            await self._last_call.wait()
            nursery.cancel_scope.cancel()

    def _starter(self, strands: Strands, carry: Carry) -> Callable[[socket.socket, Address], None]:
        state = self._state

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

    def _goer_on(self, strands: Strands) -> Callable[[Record, ConnectionFailed], None]:
        state = self._state

        def go_on(record: Record, failed: ConnectionFailed) -> None:
            if strands.closed:
                orders.fail(record, failed)
            else:
                strands.start(outbound.carry_on(record, failed, state))

        return go_on

    def _listen(self, name: str, port: int, hosts: tuple[str, ...]) -> list[socket.socket]:
        found = []
        for host in hosts:
            try:
                sock = sockets.listen(host, port)
            except OSError as error:
                raise CommandError(
                    f"cannot listen on port {port} ({name}): {error.strerror}",
                    why="another program, perhaps another sidecar, has the port",
                    fix=f"ss -ltnp 'sport = :{port}'",
                ) from error
            if sock is not None:
                found.append(self._stack.enter_context(sock))
        if not found:
            raise CommandError(f"no address to listen on for {name}", fix="ip addr")
        self._listeners[name] = ", ".join(str(sockets.peer_address(sock.getsockname())) for sock in found)
        return found

    async def _signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
            async for number in received:
                if number != signal.SIGHUP:
                    self._ask_drain(parse_duration(self._state.settings.proxy.drain_timeout))
                    continue
                try:
                    self._reload.send_nowait(None)
                except trio.WouldBlock:
                    pass  # the files are about to be read anyway

    def _ask_drain(self, timeout: float) -> None:
        """A second request, say an impatient Ctrl-C, ends the drain at once."""
        self._drain_within = timeout if self._drain_within is None else 0.0
        self._drain_asked.set()

    async def _drain(self) -> None:
        """New connections are still taken until none is open, or in time; then the last ones may end too."""
        state = self._state
        state.draining = True
        state.pool.close_idle()
        for tunnel in state.tunnels:
            tunnel.go_away()
        started = time.monotonic()
        await self._until_none_is_open(started)
        self._last_call.set()
        await trio.sleep(_LAST_CALL)
        await self._until_none_is_open(started)
        left = len(state.registry.open)
        if left:
            _log.warning("%d connections did not end in time and are reset", left)
            state.registry.abort_all(Reason.DRAIN, EndedBy.DRAIN)
            with trio.move_on_after(_LAST_RECORDS):
                await state.registry.empty.wait()

    async def _until_none_is_open(self, started: float) -> None:
        while self._state.registry.open and time.monotonic() - started < (self._drain_within or 0.0):
            with trio.move_on_after(0.1):
                await self._state.registry.empty.wait()

    async def _follow(self) -> None:
        state, mesh = self._state, self._state.settings.mesh

        async def refused(problem: ConfigError) -> None:
            if state.snapshot.version == 0:
                stored = await trio.to_thread.run_sync(last_good.load, mesh.last_good, 1)
                if stored is not None:
                    await state.apply(stored)
                    _log.warning("going on with the mesh that was good before the restart, from %s", mesh.last_good)
            state.config_problem = str(problem)
            state.metrics.config_refused += 1
            _log.error("mesh files refused, the last good state stays: %s", problem)
            self._first_look.set()

        async def apply(snapshot: Snapshot) -> None:
            # The follower does not count the one that was kept from before a restart.
            snapshot = structs.replace(snapshot, version=state.snapshot.version + 1)
            try:
                # First, so that whatever has been in force is so after a restart too.
                await trio.to_thread.run_sync(last_good.save, snapshot, mesh.last_good)
            except OSError as error:
                _log.warning("the mesh could not be kept for a restart: %s", error)
            await state.apply(snapshot)
            _log.info("mesh version %d: %d services", snapshot.version, count_services(snapshot))
            self._first_look.set()

        await follow.follow(mesh.directory, state.snapshot.version, apply, refused, reload=self._reloads)

    async def _follow_addresses(self) -> None:
        """An address that comes or goes may turn what was another host's into ours."""
        addresses = self._state.addresses
        while True:
            await trio.lowlevel.wait_readable(addresses.fileno())
            addresses.forget()
            self._state.orders.revoke_all()

    def _renewed(self) -> None:
        self._state.orders.revoke_all()
        self._state.metrics.renewals += 1
        self._state.pool.close_idle()

    async def _reap(self) -> None:
        while True:
            await trio.sleep(_REAP_EVERY)
            self._state.pool.reap(time.monotonic())
            self._state.orders.reap(time.monotonic())
