"""What dies, and what does not notice: one worker, the parent, or all of them in order."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from meshnet.model.admin import Accepted, Drain
from meshnet_cli.client import ask
from tests.proxy.conftest import API, Hosts
from tests.proxy.metrics import get, value
from tests.proxy.programs import accept, converse, listen, nobody_came, read, reason
from tests.proxy.test_records import logged
from tests.proxy.workers.heard import following
from tests.proxy.workers.pairs import is_gone, on_every_worker, process_of, row, stopped
from tests.world import wait_for

pytestmark = pytest.mark.netns

OPENED = "meshnet_tcp_connections_opened_total"


@pytest.fixture
def restarted(hosts: Hosts) -> Iterator[Hosts]:
    """Sidecars that a test may stop."""
    yield hosts
    for sidecar in hosts.mesh.sidecars.values():
        if sidecar.process is None or not sidecar.process.alive:
            sidecar.start()


def test_a_worker_that_is_killed_takes_nobody_along_and_comes_back(hosts: Hosts) -> None:
    sidecar = hosts.sidecar(hosts.web)
    before = row(sidecar, 1)
    with listen(hosts.api, 8080) as server, on_every_worker(hosts, server) as pairs:
        counted = value(hosts.web, OPENED)
        os.kill(before.pid, signal.SIGKILL)
        wait_for(lambda: row(sidecar, 1).pid != before.pid)
        assert all(pair.talks() for pair in pairs if pair.worker == 2)
        converse(hosts.web.connect(API, 8080), accept(server))  # whether it is back or not
        assert value(hosts.web, OPENED) > counted
        again = wait_for(lambda: (now := row(sidecar, 1)).ready and now)
        assert again.deaths == before.deaths + 1
        assert value(hosts.web, "meshnet_worker_deaths_total") == again.deaths + row(sidecar, 2).deaths
        assert f"worker 1 (pid {before.pid}) ended: killed by signal 9; again in 0.2 s" in hosts.log(hosts.web)
        with on_every_worker(hosts, server) as later:
            assert {pair.worker for pair in later} == {1, 2}
        os.kill(again.pid, signal.SIGKILL)  # soon after: it waits for longer
        wait_for(
            lambda: f"worker 1 (pid {again.pid}) ended: killed by signal 9; again in 0.4 s" in hosts.log(hosts.web)
        )
        wait_for(lambda: row(sidecar, 1).ready)
        assert all(pair.talks() for pair in pairs if pair.worker == 2)


def test_what_waits_when_a_worker_dies_is_taken_by_the_other(hosts: Hosts) -> None:
    sidecar = hosts.sidecar(hosts.web)
    one, two = sidecar.status().workers
    with listen(hosts.api, 8080) as server, ExitStack() as stack:
        with stopped(one.pid), stopped(two.pid):
            clients = [stack.enter_context(hosts.web.connect(API, 8080)) for _ in range(10)]
            assert nobody_came(server)
            os.kill(one.pid, signal.SIGKILL)
        for client in clients:
            client.sendall(b"still here")
        apps = [stack.enter_context(accept(server)) for _ in clients]
        assert {read(app, 10) for app in apps} == {b"still here"}
    wait_for(lambda: row(sidecar, 1).ready)


def test_who_follows_hears_of_a_worker_that_was_started_again(hosts: Hosts) -> None:
    sidecar = hosts.sidecar(hosts.web)
    with following(hosts) as heard, listen(hosts.api, 8080) as server:
        pid = row(sidecar, 2).pid
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: row(sidecar, 2).ready and row(sidecar, 2).pid != pid)
        with on_every_worker(hosts, server) as pairs:
            ids = {pair.record.id for pair in pairs}
            wait_for(lambda: heard.ids("open") >= ids)


def test_when_the_parent_is_killed_a_new_one_takes_over_at_once_and_nothing_is_cut(restarted: Hosts) -> None:
    hosts = restarted
    sidecar = hosts.sidecar(hosts.web)
    with listen(hosts.api, 8080) as server, on_every_worker(hosts, server) as pairs:
        old = sidecar.status()
        os.kill(old.pid, signal.SIGKILL)
        process_of(sidecar).popen.wait(10)
        wait_for(lambda: not hosts.web.listens(15101), what="the ports are given up")
        assert all(pair.talks() for pair in pairs)
        sidecar.start()
        assert sidecar.status().pid != old.pid
        with on_every_worker(hosts, server):
            assert all(pair.talks() for pair in pairs)
        for pair in pairs:
            converse(pair.client, pair.app)
        for worker in old.workers:
            wait_for(is_gone(worker.pid), what="the old workers have ended")
    ended = {line.id: reason(line) for line in logged(hosts, hosts.web)}
    assert {ended[pair.record.id] for pair in pairs} == {"ok by client in data"}


def test_a_parent_that_is_killed_while_it_drains_cuts_nothing_either(restarted: Hosts) -> None:
    hosts = restarted
    sidecar, process = hosts.sidecar(hosts.web), process_of(hosts.sidecar(hosts.web))
    workers = sidecar.status().workers
    with listen(hosts.api, 8080) as server, on_every_worker(hosts, server) as pairs:
        process.popen.terminate()
        wait_for(lambda: not any(worker.ready for worker in sidecar.status().workers))
        os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda: not hosts.web.listens(15101), what="the ports are given up")
        for pair in pairs:
            assert pair.talks()
            converse(pair.client, pair.app)
        for worker in workers:
            wait_for(is_gone(worker.pid), what="the workers have ended")


def test_a_drain_waits_for_what_is_open_and_takes_new_connections_meanwhile(restarted: Hosts) -> None:
    hosts = restarted
    sidecar, process = hosts.sidecar(hosts.web), process_of(hosts.sidecar(hosts.web))
    with listen(hosts.api, 8080) as server, on_every_worker(hosts, server) as pairs:
        # As an init system does it: all processes at once. It is one request, not one of several.
        os.killpg(process.pid, signal.SIGTERM)
        wait_for(lambda: sidecar.status().draining)
        assert get(hosts.web, "/readyz") == (503, "draining\n")
        converse(hosts.web.connect(API, 8080), accept(server))
        assert all(pair.talks() for pair in pairs)
        for pair in pairs:
            if pair.worker == 1:
                converse(pair.client, pair.app)
        wait_for(lambda: row(sidecar, 1).pid == 0, what="the end of the worker that has nothing left")
        converse(hosts.web.connect(API, 8080), accept(server))
        assert process.alive
        for pair in pairs:
            if pair.worker == 2:
                assert pair.talks()
                converse(pair.client, pair.app)
        assert process.popen.wait(10) == 0
    assert not hosts.web.listens(15101)
    assert "again in" not in hosts.log(hosts.web).rpartition("listening: ")[2]


def test_a_second_signal_ends_the_drain_of_both_at_once(restarted: Hosts) -> None:
    hosts = restarted
    sidecar, process = hosts.sidecar(hosts.web), process_of(hosts.sidecar(hosts.web))
    with listen(hosts.api, 8080) as server, on_every_worker(hosts, server) as pairs:
        process.popen.terminate()
        wait_for(lambda: all(not worker.ready for worker in sidecar.status().workers))
        process.popen.terminate()
        assert process.popen.wait(5) == 0
        for pair in pairs:
            with pytest.raises(ConnectionResetError):
                pair.client.recv(1)
    ids = {pair.record.id for pair in pairs}
    lines = [line for line in logged(hosts, hosts.web) if line.id in ids]
    assert sorted(line.id for line in lines) == sorted(ids)
    assert {reason(line) for line in lines} == {"drain by drain in data"}


def test_the_admin_socket_can_ask_both_to_drain(restarted: Hosts) -> None:
    hosts = restarted
    sidecar, process = hosts.sidecar(hosts.web), process_of(hosts.sidecar(hosts.web))
    with listen(hosts.api, 8080) as server, on_every_worker(hosts, server) as pairs:
        said = ask(sidecar.settings.admin.socket, Drain(timeout=20.0), Accepted)
        assert said.message == f"draining {len(pairs)} connections"
        for pair in pairs:
            converse(pair.client, pair.app)
        assert process.popen.wait(10) == 0


def test_a_worker_that_stands_still_does_not_keep_the_others_from_their_end(restarted: Hosts) -> None:
    hosts = restarted
    sidecar, process = hosts.sidecar(hosts.web), process_of(hosts.sidecar(hosts.web))
    with stopped(row(sidecar, 1).pid):
        ask(sidecar.settings.admin.socket, Drain(timeout=0.0), Accepted)
        assert process.popen.wait(15) == 0
    assert "does not end, and is killed" in hosts.log(hosts.web)
