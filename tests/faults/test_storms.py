"""Too much at once: callers of a dead service, changes of the mesh, clients that are stuck or slow."""

import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.bench.load import pss
from tests.faults.books import Books
from tests.faults.causes import SECRET
from tests.faults.conftest import once
from tests.proxy.programs import accept, ask, echo, listen, read, reason, reset
from tests.traffic.conftest import Hosts, Name, traffic
from tests.world import Host, wait_for

pytestmark = pytest.mark.netns

STORM, AT_ONCE = 2000, 250
CHANGES = 1000
STUCK, SLOW = {"auto": 1000, "python": 100}, 50  # what is to be seen of it is the same for each


def test_a_storm_of_clients_of_a_dead_service_is_reset_and_hardly_reaches_it(hosts: Hosts, name: Name) -> None:
    api, twin = hosts.apis
    alive = hosts.new_name()
    hosts.write(hosts.service(name, [api, twin]), hosts.service(alive, [api]))
    books = {host.name: Books(hosts.sidecar(host)) for host in (hosts.web, api, twin)}
    slowest = 0.0
    with echo(api, alive.port):
        for _ in range(STORM // AT_ONCE):
            storm = Callers(hosts.web, name, AT_ONCE)
            began = time.monotonic()
            assert ask(hosts.web, alive.address, alive.port, SECRET) == SECRET  # in the middle of it
            slowest = max(slowest, time.monotonic() - began)
            storm.wait_until_all_are_reset()
    assert slowest < 5
    told = wait_for(lambda: len(found := books["web"].told()) >= STORM + STORM // AT_ONCE and found)
    ends = {reason(line).partition(" ")[0] for line in told if line.destination.service == f"{name.name}:{name.port}"}
    assert ends == {"connect.refused", "breaker.open"}
    # Those that were on their way when the breakers opened, and a probe now and then.
    assert len(books["twin"].told()) < STORM / 4


class Callers:
    """So many connections at once, which are to be reset."""

    def __init__(self, host: Host, name: Name, count: int) -> None:
        self._selector = selectors.DefaultSelector()
        for _ in range(count):
            client = host.open_socket()
            client.setblocking(False)
            client.connect_ex((name.address, name.port))
            self._selector.register(client, selectors.EVENT_READ)

    def wait_until_all_are_reset(self) -> None:
        with self._selector:
            while self._selector.get_map():
                ready = self._selector.select(10.0)
                assert ready, f"{len(self._selector.get_map())} are not"
                for key, _ in ready:
                    client = key.fileobj
                    assert isinstance(client, socket.socket)
                    with client, pytest.raises(ConnectionResetError):
                        client.recv(1)
                    self._selector.unregister(client)


@once
def test_a_thousand_changes_of_the_mesh_in_ten_seconds_disturb_nobody_and_the_last_one_holds(
    hosts: Hosts, name: Name
) -> None:
    api, twin = hosts.apis
    last = hosts.new_name()
    hosts.write(hosts.service(name, [api]))
    before = {sidecar: sidecar.status().config.version for sidecar in hosts.mesh.sidecars.values()}
    file, draft = hosts.mesh.directory / "mesh.yaml", hosts.world.directory / "draft"
    other = hosts.new_name()
    both = [[hosts.service(name, [api])], [hosts.service(name, [api]), hosts.service(other, [twin])]]
    with echo(api, last.port), echo(api, name.port):
        texts = []
        for services in both:
            hosts.write(*services, hosts.service(last, [api]))
            texts.append(file.read_text())
        with hosts.web.connect(last.address, last.port) as client:

            def all_is_well() -> bool:
                client.sendall(SECRET)
                return read(client, len(SECRET)) == ask(hosts.web, name.address, name.port, SECRET) == SECRET

            began = time.monotonic()
            for number in range(CHANGES):
                draft.write_text("kind: Nonsense\n" if number % 10 == 9 else texts[number % 2])
                draft.replace(file)
                assert number % 20 or all_is_well()
            hosts.mesh.write(*both[1], hosts.service(last, [api]))
            assert time.monotonic() - began < 10
            for sidecar in before:
                wait_for(lambda each=sidecar: each.endpoints(other.name).items and not each.status().config.problem)
            assert all_is_well()
    for sidecar, version in before.items():
        assert version < sidecar.status().config.version < version + CHANGES / 4


@contextmanager
def small_buffers(*hosts: Host) -> Iterator[None]:
    """The kernel keeps little of each connection, so that what many hold is to be seen, and fits."""
    before = []
    for host in hosts:
        with host.entered():
            for kind in ("rmem", "wmem"):
                file = Path(f"/proc/sys/net/ipv4/tcp_{kind}")
                before.append((host, file, file.read_text()))
                file.write_text("4096 16384 32768")
    yield
    for host, file, text in before:
        with host.entered():
            file.write_text(text)


def test_a_crowd_of_stuck_clients_and_fifty_slow_ones_cost_little_memory_and_nobody_his_answer(
    hosts: Hosts, name: Name, relay: str
) -> None:
    api, quick = hosts.apis[0], hosts.new_name()
    hosts.write(
        hosts.service(name, [api]),
        hosts.service(quick, [api]),
        traffic(name, limits={"maxConnections": 0}, connect={"attemptTimeout": "30s", "totalTimeout": "30s"}),
    )
    sidecars = [hosts.sidecar(hosts.web), hosts.sidecar(api)]
    pids = [sidecar.status().pid for sidecar in sidecars]
    with (
        small_buffers(hosts.web, api),
        listen(api, name.port, backlog=2048) as server,
        echo(api, quick.port),
        ExitStack() as stack,
    ):
        assert ask(hosts.web, quick.address, quick.port, SECRET) == SECRET
        before = [pss([pid]) for pid in pids]
        clients = [stack.enter_context(hosts.web.connect(name.address, name.port)) for _ in range(STUCK[relay] + SLOW)]
        server.settimeout(30.0)
        apps = [stack.enter_context(accept(server)) for _ in clients]
        slow = clients[:SLOW]
        heard = fill(apps, slow)
        grown = [pss([pid]) - was for pid, was in zip(pids, before, strict=True)]
        began = time.monotonic()
        assert ask(hosts.web, quick.address, quick.port, SECRET) == SECRET
        assert time.monotonic() - began < 5
        assert heard > 50 * 512 * SLOW
        assert max(grown) / len(clients) < 128, grown  # KiB; of 44 at the clients' side
        for sidecar in sidecars:  # of the last answer one may hear a moment later than its client
            wait_for(lambda each=sidecar: each.status().open_connections == len(clients))
        for client in clients:
            reset(client)


def fill(apps: Sequence[socket.socket], slow: Sequence[socket.socket]) -> int:
    """Each application sends until nothing goes any more. Then slow clients read a little now and then, and more goes
    to them: how much they have read.
    """
    said = bytes(65536)
    for sock in (*apps, *slow):
        sock.setblocking(False)

    def send() -> bool:
        return sum(_goes(app, said) for app in apps) > 0

    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < 0.5:
        if send():
            quiet_since = time.monotonic()
    heard = 0
    for _ in range(100):
        heard += sum(len(client.recv(512)) for client in slow)
        send()
    return heard


def _goes(app: socket.socket, said: bytes) -> bool:
    try:
        return bool(app.send(said))
    except BlockingIOError:
        return False
