"""Ordinary programs between two machines, none of which knows of meshnet, and whether the sidecars carried them."""

import json
import re
import subprocess
from itertools import product

from tests.machines import state
from tests.machines.machine import Failed, Machine, wait_for

_BULK = 100_000_000  # bytes
PORTS = {"ssh": 22, "iperf3": 5201, "postgresql": 5432, "redis": 6379}

# What an administrator does so that other machines may come in.
_SERVE = """
set -e
conf=$(ls -d /etc/postgresql/*/main)
echo "listen_addresses = '*'" >"$conf/conf.d/listen.conf"
echo 'host all postgres samenet trust' >>"$conf/pg_hba.conf"
echo 'host all postgres 127.0.0.0/8 trust' >>"$conf/pg_hba.conf"
sed -i 's/^bind .*/bind * -::*/; s/^protected-mode .*/protected-mode no/' /etc/redis/redis.conf
printf '[Service]\\nExecStart=/usr/bin/iperf3 -s\\n[Install]\\nWantedBy=multi-user.target\\n' \\
    >/etc/systemd/system/iperf3-server.service
systemctl daemon-reload
systemctl enable -q postgresql redis-server iperf3-server
systemctl restart postgresql redis-server iperf3-server
"""

# One connection of each family. A line comes back for each that is sent, for as long as the connection lives.
_ECHO_SERVER = """
import socket, threading
def echo(sock):
    for line in sock.makefile():
        sock.sendall(line.encode())
listener = socket.create_server(('::', 7777), family=socket.AF_INET6, dualstack_ipv6=True)
for _ in range(2):
    threading.Thread(target=echo, args=(listener.accept()[0],)).start()
"""
_ECHO_CLIENT = """
import socket, sys
socks = [socket.create_connection((address, 7777)) for address in {addresses}]
files = [sock.makefile() for sock in socks]
for line in sys.stdin:
    for sock in socks:
        sock.sendall(line.encode())
    print(*[file.readline().strip() for file in files], flush=True)
"""

# PostgreSQL answers a request for TLS with one letter (protocol-message-formats, SSLRequest).
_CALLER = """
import select, socket, sys
served = 0
while not select.select([sys.stdin], [], [], 0.005)[0]:
    try:
        with socket.create_connection(('{address}', 5432), 20) as sock:
            sock.sendall(bytes([0, 0, 0, 8, 4, 210, 22, 47]))
            assert sock.recv(1) in (b'S', b'N'), 'no answer'
        served += 1
    except (OSError, AssertionError) as error:
        print('after', served, type(error).__name__, error)
print(served, 'served')
"""


def install(machine: Machine) -> None:
    machine.run("DEBIAN_FRONTEND=noninteractive apt-get install -y -qq postgresql redis-server redis-tools iperf3")
    machine.run(_SERVE)


def may_log_in(guest: Machine, host: Machine) -> None:
    """Root of `guest` as vagrant on `host`."""
    key = guest.run(
        "mkdir -p -m 700 /root/.ssh; [ -e /root/.ssh/id_ed25519 ] ||"
        " ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519; cat /root/.ssh/id_ed25519.pub"
    )
    host.run("install -d -m 700 -o vagrant -g vagrant ~vagrant/.ssh; cat >>~vagrant/.ssh/authorized_keys", stdin=key)


def ssh(command: str, to: str) -> str:
    options = "-o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    return f"ssh {options} vagrant@{to} {command!r}"


def all_programs(client: Machine, server: Machine) -> None:
    """Each program does something that only its real server answers, by either family."""

    def expect(command: str, answer: str) -> None:
        said = client.run(command)
        if answer not in said:
            raise Failed(f"{client.name}: {command}: {said!r}, and not {answer!r}")

    for port in PORTS.values():
        wait_for(lambda port=port: _listens(server, port), f"a server at {server.name}:{port}")  # type: ignore[misc] # bound now
    for address in (server.address, server.address6):
        expect(f"psql -qAt -h {address} -U postgres -c 'select 6 * 7'", "42")
        expect(f"psql -qAt -h {address} -U postgres -c \"select length(repeat('x', 9000000))\"", "9000000")
        expect(f"redis-cli -h {address} set from {client.name}", "OK")
        expect(f"redis-cli -h {address} get from", client.name)
        expect(ssh("hostname", to=address), server.name)
        said = json.loads(client.run(f"iperf3 -J -n {_BULK} -c {address}"))
        # What is still on its way when the client has sent the last of it is not counted.
        if said["end"]["sum_received"]["bytes"] < _BULK / 2:
            raise Failed(f"iperf3: {said['end']}")


def need_carried(client: Machine, server: Machine) -> None:
    """All programs again, by both sidecars: each program once at least, by either family."""
    before = {machine: state.opened(machine) for machine in (client, server)}
    all_programs(client, server)
    for machine, count in before.items():
        if state.opened(machine) - count < 2 * len(PORTS):
            raise Failed(f"{machine.name} has not carried what {client.name} asked of {server.name}")


def need_client_address(client: Machine, server: Machine) -> None:
    """PostgreSQL at `server` sees it: through a tunnel, and in plain text, as the proxy's group on `client` calls."""
    for uncaptured in ("", "setpriv --regid=15137 --clear-groups "):
        for address, own in ((server.address, client.address), (server.address6, client.address6)):
            before = state.opened(server)
            said = client.run(f"{uncaptured}psql -qAt -h {address} -U postgres -c 'select host(inet_client_addr())'")
            if said.strip() != own or state.opened(server) == before:
                raise Failed(f"{uncaptured}{client.name} at {address} is {said!r} to PostgreSQL, and not {own}")


def need_mtls(client: Machine, server: Machine) -> None:
    """Both sidecars have a record of every program's connection, by mTLS, and each names the other."""
    for machine, direction, other in ((client, "outbound", server), (server, "inbound", client)):
        items = json.loads(machine.run("meshnet conns --all -o json"))["items"]
        for address, (name, port) in product((server.address, f"[{server.address6}]"), PORTS.items()):
            found = [
                item
                for item in items
                if item["direction"] == direction and item["originalDestination"] == f"{address}:{port}"
            ]
            if not found:
                raise Failed(f"{machine.name}: {name} at {address} was not captured ({direction}): {items}")
            for item in found:
                if item["tls"]["mode"] != "mtls" or f"/sa/{other.name}" not in item["tls"]["peerIdentity"]:
                    raise Failed(f"{machine.name}: {name} is not by mTLS with {other.name}: {item}")


class Caller:
    """Connects from `client` to PostgreSQL at `server` again and again, until it is asked how that went."""

    def __init__(self, client: Machine, server: Machine) -> None:
        self._name = f"{client.name} to {server.name}"
        self._client = client.start(f'python3 -c "{_CALLER.format(address=server.address)}"')

    def need_all_served(self) -> None:
        assert self._client.stdin is not None
        self._client.stdin.close()
        self._client.wait(30)
        assert self._client.stdout is not None
        said = self._client.stdout.read()
        self._client.stdout.close()
        if not re.fullmatch(r"[1-9]\d+ served\n", said):
            raise Failed(f"{self._name}: {said}")


class OpenConnection:
    """One of each family that is kept open from `client` to `server` while other things happen."""

    def __init__(self, client: Machine, server: Machine) -> None:
        self._server = server.start(f'python3 -c "{_ECHO_SERVER}"')
        wait_for(lambda: _listens(server, 7777), "the echo server")
        addresses = (server.address, server.address6)
        self._client = client.start(f'python3 -c "{_ECHO_CLIENT.format(addresses=addresses)}"')
        self.need_alive()

    def need_alive(self) -> None:
        assert self._client.stdin is not None
        assert self._client.stdout is not None
        self._client.stdin.write("hello\n")
        self._client.stdin.flush()
        if (said := self._client.stdout.readline()) != "hello hello\n":
            raise Failed(f"an open connection is no more: {said!r} {self._client.stdout.read()!r}")

    def close(self) -> None:
        for process in (self._client, self._server):
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _listens(machine: Machine, port: int) -> bool:
    return f":{port} " in machine.run("ss -Hltn")
