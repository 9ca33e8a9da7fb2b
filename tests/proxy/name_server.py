"""A name server on a host of a world, which says what a test wants it to say."""

import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

from tests.world import Host

_UDP_ROOM = 512


class NameServer:
    """`records` are addresses by absolute name (`db.example.com.`), or one of the words below; without, NXDOMAIN.

    `asked` are the names that were asked for by address record, in order, each with `udp` or `tcp`.
    """

    SERVFAIL, NXDOMAIN, SILENCE = "SERVFAIL", "NXDOMAIN", "SILENCE"

    def __init__(self) -> None:
        self.records: dict[str, list[str] | str] = {}
        self.ttl = 1
        self.asked: list[tuple[str, str]] = []

    def asked_for(self, name: str) -> int:
        return sum(asked == name for asked, _ in self.asked)

    def answer(self, question: bytes, how: str) -> bytes:
        """Nothing at all for a name whose record is SILENCE."""
        query = dns.message.from_wire(question)
        (asked,) = query.question
        name = asked.name.to_text()
        if asked.rdtype == dns.rdatatype.A:
            self.asked.append((name, how))
        response = dns.message.make_response(query)
        found = self.records.get(name, self.NXDOMAIN)
        if found == self.SILENCE:
            return b""
        if found == self.NXDOMAIN:
            response.set_rcode(dns.rcode.NXDOMAIN)
        elif found == self.SERVFAIL:
            response.set_rcode(dns.rcode.SERVFAIL)
        else:
            wanted = [text for text in found if (":" in text) == (asked.rdtype == dns.rdatatype.AAAA)]
            if wanted:
                response.answer.append(dns.rrset.from_text(asked.name, self.ttl, "IN", asked.rdtype, *wanted))
        wire = response.to_wire()
        if how == "udp" and len(wire) > _UDP_ROOM:
            short = dns.message.make_response(query)
            short.flags |= dns.flags.TC
            wire = short.to_wire()
        return wire


@contextmanager
def name_server(host: Host) -> Iterator[NameServer]:
    """On port 53 of the host, in IPv4, by UDP and TCP."""
    server = NameServer()
    stop_read, stop_write = socket.socketpair()
    with ExitStack() as stack, stop_read, stop_write:
        udp = stack.enter_context(host.open_socket(kind=socket.SOCK_DGRAM))
        tcp = stack.enter_context(host.open_socket())
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for sock in (udp, tcp):
            sock.bind((host.address, 53))
        tcp.listen()

        def serve() -> None:
            while True:
                ready, _, _ = select.select([udp, tcp, stop_read], [], [])
                if stop_read in ready:
                    return
                if udp in ready:
                    question, asker = udp.recvfrom(4096)
                    if answer := server.answer(question, "udp"):
                        udp.sendto(answer, asker)
                if tcp in ready:
                    with tcp.accept()[0] as connection:
                        connection.settimeout(5)
                        size = struct.unpack("!H", connection.recv(2, socket.MSG_WAITALL))[0]
                        answer = server.answer(connection.recv(size, socket.MSG_WAITALL), "tcp")
                        connection.sendall(struct.pack("!H", len(answer)) + answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server
        finally:
            stop_write.send(b".")
            thread.join()


def resolver_files(host: Host, server: Host, *lines: str, hosts: str = "") -> dict[str, str]:
    """For [mesh] of the host's sidecar: it asks `server`, and looks into a file of hosts first. `lines`: more."""
    resolv_conf, hosts_file = host.directory / "resolv.conf", host.directory / "hosts"
    resolv_conf.write_text("\n".join([f"nameserver {server.address}", *lines, ""]))
    hosts_file.write_text(hosts)
    return {"resolv_conf": str(resolv_conf), "hosts_file": str(hosts_file)}


__all__ = ["NameServer", "name_server", "resolver_files"]
