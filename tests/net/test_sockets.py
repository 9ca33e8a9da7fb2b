"""TCP sockets as the proxy wants them, on the loopback and between hosts."""

import errno
import os
import socket
import subprocess
import sys
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import pytest
import trio

from meshnet.errors import ConnectionFailed, Reason
from meshnet.model.address import Address
from meshnet.net import sockets
from tests.world import Host, World, eventually, wait_for

STATES = ("close_wait", "fin_wait")


def test_a_peer_that_reset_is_noticed_and_no_byte_is_taken() -> None:
    near, far = connected_pair()
    with near:
        assert not sockets.was_reset(near)
        far.send(b"x")
        wait_for(lambda: near.recv(1, socket.MSG_PEEK))
        assert not sockets.was_reset(near)
        assert near.recv(1) == b"x"
        sockets.reset(far)
        wait_for(lambda: sockets.was_reset(near))


def test_a_peer_that_finished_sending_has_not_reset() -> None:
    near, far = connected_pair()
    with near, far:
        far.shutdown(socket.SHUT_WR)
        near.setblocking(True)
        assert near.recv(1) == b""
        near.setblocking(False)
        assert not sockets.was_reset(near)


def test_a_reset_is_an_rst_for_the_peer_and_not_an_end() -> None:
    near, far = connected_pair()
    with near:
        sockets.reset(far)
        near.setblocking(True)
        with pytest.raises(ConnectionResetError):
            near.recv(1)


def test_resetting_a_socket_that_is_closed_does_nothing() -> None:
    near, far = connected_pair()
    near.close()
    sockets.reset(near)
    far.close()


def test_who_has_no_capabilities_may_not_mark() -> None:
    # capset(2), version 3, with nothing in it: what root gives up so is gone for this process only.
    run_python("""
        import ctypes
        from meshnet.net.sockets import can_mark
        assert can_mark(1)
        header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, nothing) == 0
        assert not can_mark(1)
    """)


def test_an_address_this_host_has_not_gives_no_listener() -> None:
    assert sockets.listen("192.0.2.1", 0) is None


def test_a_port_that_is_taken_is_an_error() -> None:
    with listening() as listener:
        with pytest.raises(OSError) as failed:
            sockets.listen("127.0.0.1", listener.getsockname()[1])
        assert failed.value.errno == errno.EADDRINUSE


def test_an_ipv6_listener_leaves_ipv4_to_another() -> None:
    first = sockets.listen("::", 0)
    assert first is not None
    with first:
        second = sockets.listen("0.0.0.0", first.getsockname()[1])
        assert second is not None
        second.close()


def test_a_v4_mapped_or_scoped_peer_is_told_by_its_plain_address() -> None:
    assert sockets.peer_address(("::ffff:10.0.0.1", 80, 0, 0)) == Address("10.0.0.1", 80)
    assert sockets.peer_address(("fe80::1%eth0", 80, 0, 2)) == Address("fe80::1", 80)
    assert sockets.peer_address(("10.0.0.1", 80)) == Address("10.0.0.1", 80)


async def test_accepted_sockets_do_not_block_and_inherit_what_was_set_on_the_listener() -> None:
    taken: list[tuple[socket.socket, Address]] = []
    with listening() as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sockets.accept_forever, listener, lambda *pair: taken.append(pair))
            with socket.create_connection(listener.getsockname()) as client:
                await eventually(lambda: taken)
                sock, peer = taken[0]
                with sock:
                    assert peer == Address(*client.getsockname())
                    assert not sock.getblocking()
                    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
            nursery.cancel_scope.cancel()


async def test_connections_that_were_opened_together_do_not_all_ask_together_whether_the_peer_lives() -> None:
    times = set()
    with listening() as listener, ExitStack() as stack:
        for _ in range(20):
            leg = stack.enter_context(await sockets.connect(address_of(listener), mark=0, timeout=5))
            options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            idle, interval, count = (leg.getsockopt(socket.IPPROTO_TCP, option) for option in options)
            assert (idle + interval < 60, count) == (True, 6)
            times.add((idle, interval))
    assert len(times) > 10


def test_probes_come_before_conntrack_forgets_a_half_closed_connection_istio43297(world: World) -> None:
    """Each probe refreshes its entry, and with it the translation of the end that is still to come."""
    with world.host("web").entered(), closing(listening()) as listener:
        folder = Path("/proc/sys/net/netfilter")
        forgotten = min(int((folder / f"nf_conntrack_tcp_timeout_{state}").read_text()) for state in STATES)
        idle = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        interval = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
        assert idle + interval < forgotten


def test_accepting_goes_on_after_running_out_of_descriptors() -> None:
    run_python("""
        import logging, resource, socket, trio
        from meshnet.net import sockets

        listener = sockets.listen("127.0.0.1", 0)
        taken, said = [], []

        class Listen(logging.Handler):
            def emit(self, record):
                said.append(record.getMessage())

        logging.getLogger("meshnet.net").addHandler(Listen())

        async def until(condition):
            with trio.fail_after(5):
                while not condition():
                    await trio.sleep(0.01)

        async def main():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sockets.accept_forever, listener, lambda sock, peer: taken.append(sock))
                clients = [socket.socket() for _ in range(3)]
                # The clients have their descriptors; nothing is left for the accepted ends.
                resource.setrlimit(resource.RLIMIT_NOFILE, (clients[-1].fileno() + 1, 4096))
                for client in clients:
                    client.connect(listener.getsockname())
                await until(lambda: said)
                assert "cannot accept" in said[0] and not taken
                resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
                await until(lambda: len(taken) == 3)
                nursery.cancel_scope.cancel()

        trio.run(main)
    """)


async def test_a_connected_socket_carries_the_mark_and_does_not_block() -> None:
    with listening() as listener, await sockets.connect(address_of(listener), mark=0x1000, timeout=5) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == 0x1000
        assert not sock.getblocking()


async def test_connecting_says_that_it_was_refused() -> None:
    with listening() as listener:
        address = address_of(listener)
    with pytest.raises(ConnectionFailed) as failed:
        await sockets.connect(address, mark=0, timeout=5)
    assert failed.value.reason is Reason.CONNECT_REFUSED


@pytest.mark.netns
@pytest.mark.parametrize("address", ["10.96.0.10", "fd96::10"])
def test_connecting_says_that_there_is_no_way(world: World, address: str) -> None:
    assert refusal(world.host("web"), address) is Reason.CONNECT_UNREACHABLE


@pytest.mark.netns
@pytest.mark.parametrize("family", ["address", "address6"])
def test_connecting_gives_up_in_time(world: World, family: str) -> None:
    assert refusal(world.host("web"), getattr(silent(world), family), timeout=0.1) is Reason.CONNECT_TIMEOUT


@pytest.mark.netns
def test_a_connect_that_is_cancelled_leaves_no_descriptor(world: World) -> None:
    web, api = world.host("web"), silent(world)

    async def give_up() -> None:
        before = os.listdir("/proc/self/fd")
        with trio.move_on_after(0.02):
            await sockets.connect(Address(api.address, 80), mark=0, timeout=60)
        assert os.listdir("/proc/self/fd") == before

    with web.entered():
        trio.run(give_up)


def silent(world: World) -> Host:
    """A host that answers nothing on port 80."""
    api = world.host("api")
    chain = "type filter hook input priority 0; tcp dport 80 drop;"
    api.run("nft", "-f", "-", stdin=f"table inet t {{ chain c {{ {chain} }}; }}")
    return api


def refusal(host: Host, address: str, timeout: float = 5.0) -> Reason:
    """Why a connect from `host` fails."""
    with host.entered(), pytest.raises(ConnectionFailed) as failed:
        trio.run(partial(sockets.connect, Address(address, 80), mark=0, timeout=timeout))
    return failed.value.reason


def connected_pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection, non-blocking."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    near.setblocking(False)
    far.setblocking(False)
    return near, far


def listening() -> socket.socket:
    listener = sockets.listen("127.0.0.1", 0)
    assert listener is not None
    return listener


def address_of(listener: socket.socket) -> Address:
    return sockets.peer_address(listener.getsockname())


def run_python(code: str) -> None:
    """In a process of its own, for what cannot be undone in this one."""
    body = "if True:\n" + code  # so that it may be indented
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, env=environment, timeout=30)
    assert done.returncode == 0, done.stderr


async def test_who_inherits_a_listener_takes_what_waits_at_it_also_when_the_one_who_made_it_is_gone() -> None:
    made = sockets.listen("127.0.0.1", 0)
    assert made is not None
    address = made.getsockname()
    with sockets.inherited(os.dup(made.fileno())) as listener, socket.create_connection(address) as client:
        made.close()
        assert not listener.get_inheritable()
        with pytest.raises(BlockingIOError):  # it does not wait: accept_forever goes by that
            while True:
                sock, peer = listener.accept()
                assert sockets.peer_address(peer) == sockets.peer_address(client.getsockname())
                sock.close()
