"""The kernel's list of sockets has ours, as they are."""

import os
import socket
import struct

import pytest

from meshnet.net.sock_diag import ESTABLISHED, LISTEN, TcpSocket, tcp_sockets, tcp_sockets_with_info

V4 = socket.inet_pton(socket.AF_INET, "127.0.0.1")


@pytest.mark.parametrize(
    ("family", "host", "packed"),
    [
        (socket.AF_INET, "127.0.0.1", V4),
        (socket.AF_INET6, "::1", socket.inet_pton(socket.AF_INET6, "::1")),
        (socket.AF_INET6, "::ffff:127.0.0.1", V4),
    ],
)
def test_a_listener_and_both_ends_of_a_connection(family: int, host: str, packed: bytes) -> None:
    with socket.socket(family) as listener, socket.socket(family) as client:
        listener.bind((host, 0))
        listener.listen()
        port = listener.getsockname()[1]
        client.connect((host, port))
        own = client.getsockname()[1]
        found = {(it.local_port, it.remote_port): it for it in tcp_sockets() if port in (it.local_port, it.remote_port)}
        uid = os.getuid()
        inode = os.fstat(client.fileno()).st_ino
        assert found[own, port] == TcpSocket(ESTABLISHED, packed, own, packed, port, uid, inode)
        waiting = found[port, own]
        assert (waiting.state, waiting.inode) == (ESTABLISHED, 0)  # nobody has accepted it yet
        assert (found[port, 0].state, found[port, 0].inode) == (LISTEN, os.fstat(listener.fileno()).st_ino)
        with listener.accept()[0] as accepted:
            found = {(it.local_port, it.remote_port): it for it in tcp_sockets()}
            assert found[port, own].inode == os.fstat(accepted.fileno()).st_ino


def test_many_take_more_than_one_answer() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=2000) as listener:
        port = listener.getsockname()[1]
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(1500)]
        try:
            assert sum(it.remote_port == port for it in tcp_sockets()) == len(clients)
        finally:
            for client in clients:
                client.close()


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_what_the_kernel_knows_of_a_connection(family: int, host: str) -> None:
    with socket.create_server((host, 0), family=family) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection((host, port)) as client, listener.accept()[0] as server:
            client.sendall(b"x" * 1000)
            assert server.recv(1000, socket.MSG_WAITALL)
            server.sendall(b"y" * 500)
            assert client.recv(500, socket.MSG_WAITALL)
            infos = {(it.local_port, it.remote_port): info for it, info in tcp_sockets_with_info()}
            assert infos[port, 0] is None  # it listens
            info = infos[client.getsockname()[1], port]
            assert info is not None
            told = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
            assert info.rtt_us == struct.unpack_from("=I", told, 68)[0] > 0
            assert info.rtt_var_us == struct.unpack_from("=I", told, 72)[0]
            assert info.retransmits == struct.unpack_from("=I", told, 100)[0]
            assert info.bytes_received == 500
            assert info.bytes_sent in (1000, 1001)  # the kernel counts the SYN of who dialled
