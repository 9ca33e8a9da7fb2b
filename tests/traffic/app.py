"""A program in the test's own hands: it speaks first, and then repeats what it hears."""

import selectors
import socket
import threading
from types import TracebackType
from typing import Self

from tests.proxy.programs import listen
from tests.world import Host


class App:
    """Says the host's name, a line, to whoever connects. `accepted` counts connections; leaving closes them all.

    Nobody sends it more at once than a socket's buffer holds, so it never waits for one of them.
    """

    def __init__(self, host: Host, port: int) -> None:
        self.accepted = 0
        self._greeting = f"{host.name}\n".encode()
        self._clients: set[socket.socket] = set()
        self._selector = selectors.DefaultSelector()
        self._server = listen(host, port, backlog=1024)
        self._server.setblocking(False)
        self._stop, self._stopped = socket.socketpair()
        self._refusing = threading.Event()
        for sock in (self._server, self._stopped):
            self._selector.register(sock, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def refuse(self) -> None:
        """Takes no more connections; those that are open live on."""
        self._stop.send(b"!")
        self._refusing.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.close()
        self._thread.join()
        for sock in (*self._clients, self._server, self._stopped):
            sock.close()
        self._selector.close()

    def _serve(self) -> None:
        while True:
            ready = {key.fileobj for key, _ in self._selector.select()}
            if self._stopped in ready:
                if not self._stopped.recv(1):
                    return
                self._selector.unregister(self._server)
                self._server.close()
                self._refusing.set()
            elif self._server in ready:
                self._accept()
            for client in self._clients & ready:
                self._answer(client)

    def _accept(self) -> None:
        client, _ = self._server.accept()
        self.accepted += 1
        try:
            client.sendall(self._greeting)
        except OSError:
            client.close()
            return
        self._clients.add(client)
        self._selector.register(client, selectors.EVENT_READ)

    def _answer(self, client: socket.socket) -> None:
        try:
            if data := client.recv(65536):
                client.sendall(data)
                return
        except OSError:
            pass  # a reset is an end like any other
        self._selector.unregister(client)
        self._clients.remove(client)
        client.close()
