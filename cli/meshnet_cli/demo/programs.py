"""The ordinary programs of the demonstration. They know nothing of meshnet and use nothing but the standard library.

python programs.py serve NAME             HTTP on port 8080, and on port 7000 lines, where the server speaks first
python programs.py names URL COUNT        who answers, over COUNT connections that are open at once
python programs.py transfer URL SIZE      SIZE bytes up and SIZE bytes down one connection, with their hashes
"""

import hashlib
import http.client
import http.server
import json
import random
import socket
import socketserver
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

HTTP_PORT, LINE_PORT = 8080, 7000

# "" binds to every address of this family, and of IPv4 too where the family is IPv6.
_FAMILY = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
_BLOCK = random.Random(0).randbytes(1 << 20)


def serve(name: str) -> None:
    """Answer until killed."""
    lines = _Lines(("", LINE_PORT), _LineHandler)
    lines.name = name
    threading.Thread(target=lines.serve_forever, daemon=True).start()
    web = _Web(("", HTTP_PORT), _WebHandler)
    web.name = name
    web.serve_forever()


def names(url: str, count: int) -> dict[str, int]:
    """How often each server answered."""
    connections = [_connection(url) for _ in range(count)]
    seen: dict[str, int] = {}
    for connection in connections:
        connection.request("GET", "/")
        name = connection.getresponse().read().decode()
        seen[name] = seen.get(name, 0) + 1
    for connection in connections:
        connection.close()
    return seen


def transfer(url: str, size: int) -> dict[str, Any]:
    """SHA-256 of what was sent and of what arrived, both ways, each computed where it says."""
    connection = _connection(url)
    sent = hashlib.sha256()
    connection.putrequest("PUT", "/")
    connection.putheader("Content-Length", str(size))
    connection.endheaders()
    for piece in _content(size):
        sent.update(piece)
        connection.send(piece)
    up = connection.getresponse().read().decode()

    connection.request("GET", f"/content/{size}")
    response = connection.getresponse()
    received, length = hashlib.sha256(), 0
    while piece := response.read(1 << 18):
        received.update(piece)
        length += len(piece)
    connection.request("GET", "/digest")
    down = connection.getresponse().read().decode()
    connection.close()
    return {
        "up": {"sent": sent.hexdigest(), "arrived": up},
        "down": {"sent": down, "arrived": received.hexdigest(), "length": length},
    }


def _connection(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=30)


def _content(size: int) -> Iterator[bytes]:
    """`size` bytes, no piece like another, so that a lost or repeated one shows in the hash."""
    for start in range(0, size, len(_BLOCK)):
        yield (start.to_bytes(8, "big") + _BLOCK[8:])[: size - start]


class _Web(http.server.ThreadingHTTPServer):
    address_family = _FAMILY
    daemon_threads = True
    name = ""

    def server_bind(self) -> None:
        # HTTPServer's would ask DNS for the host's name, and there is no DNS here to say no.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.name, self.server_address[1]


class _WebHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    digest = ""

    def do_GET(self) -> None:
        if self.path.startswith("/content/"):
            size = int(self.path.rpartition("/")[2])
            digest = hashlib.sha256()
            self._head(size)
            for piece in _content(size):
                digest.update(piece)
                self.wfile.write(piece)
            self.digest = digest.hexdigest()
        else:
            assert isinstance(self.server, _Web)
            self._answer(self.digest if self.path == "/digest" else self.server.name)

    def do_PUT(self) -> None:
        left = int(self.headers["Content-Length"])
        digest = hashlib.sha256()
        while left and (piece := self.rfile.read(min(left, 1 << 18))):
            digest.update(piece)
            left -= len(piece)
        self._answer(digest.hexdigest())

    def _answer(self, text: str) -> None:
        self._head(len(text))
        self.wfile.write(text.encode())

    def _head(self, length: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()


class _Lines(socketserver.ThreadingTCPServer):
    address_family = _FAMILY
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128
    name = ""


class _LineHandler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, _Lines)
        self.wfile.write(f"hello from {self.server.name}\n".encode())
        for line in self.rfile:
            self.wfile.write(line)


def main(verb: str, *arguments: str) -> None:
    if verb == "serve":
        serve(arguments[0])
    else:
        url, number = arguments
        print(json.dumps(names(url, int(number)) if verb == "names" else transfer(url, int(number))))


if __name__ == "__main__":
    main(*sys.argv[1:])
