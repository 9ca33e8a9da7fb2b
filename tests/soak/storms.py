"""Too much of something: changes of the mesh, garbage, connections to who is dead. Nobody may notice any of it."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, suppress

from meshnet_cli.demo.world import Host
from tests.soak.kind import Kind
from tests.soak.stage import ADDRESSES, DEAD, Stage

_CHANGES = 300
_NONSENSE_EVERY = 10
_STORM = 200  # connections
_RESET_BY = 20.0  # seconds


class Storms:
    def __init__(self, stage: Stage, dice: random.Random) -> None:
        self._stage = stage
        self._dice = dice

    def kinds(self) -> Iterator[Kind]:
        yield Kind("mesh files changed", self._change)
        yield Kind("storm of changes of the mesh files, nonsense among them", self._change_often)
        yield Kind("garbage on every port", self._garbage)
        yield Kind("storm of connections to a dead service", self._storm)

    def _change(self, host: Host) -> None:
        for _ in range(self._dice.randrange(1, 30)):
            self._stage.write()
        self._stage.wait_until_in_force()

    def _change_often(self, host: Host) -> None:
        """As quickly as they can be written, which is some seconds; the last one holds everywhere."""
        for number in range(_CHANGES):
            if number % _NONSENSE_EVERY:
                self._stage.write()
            else:
                self._stage.write_nonsense()
        self._stage.wait_until_in_force()

    def _garbage(self, host: Host) -> None:
        """From a host that is in no mesh: what comes back does not matter, nor whether anything does."""
        settings = self._stage.sidecar(host).settings
        proxy = settings.proxy
        for port in (proxy.outbound_port, proxy.inbound_port, proxy.tunnel_port, settings.admin.health_port):
            for _ in range(self._dice.randrange(1, 10)):
                with suppress(OSError), self._stage.stranger.connect(host.address, port, timeout=1.0) as client:
                    client.sendall(self._dice.randbytes(self._dice.randrange(0, 4000)))

    def _storm(self, host: Host) -> None:
        """From where clients call: each is reset, and nobody else is the worse for it."""
        with ExitStack() as stack:
            calls = []
            for _ in range(_STORM):
                client = stack.enter_context(self._stage.web.open_socket())
                client.setblocking(False)
                client.connect_ex((ADDRESSES[DEAD], DEAD))
                calls.append(client)
            for client in calls:
                client.settimeout(_RESET_BY)
                try:
                    client.recv(1)
                except ConnectionResetError:
                    continue
                raise ValueError("a connection to a dead service was not reset")
