"""Readiness that is asked for through the rules, at a port where nobody listens (capture.readiness_port).

It takes inbound capture to come here: where the rules are gone the question is refused, so that whoever asks, a kubelet
say, takes readiness away in the same moment. No policy is asked, and nothing else can be reached by it: one question,
of a few kilobytes and seconds, has one answer, /readyz of the whole sidecar.
"""

import socket
from collections.abc import Callable

import h11
import trio

from meshnet.errors import EndedBy, Reason
from meshnet.model.address import Address
from meshnet.model.canary import IpFamily
from meshnet.proxy.admin import Answers
from meshnet.proxy.health import readyz
from meshnet.proxy.http import Answer, serve
from meshnet.proxy.record import Record
from meshnet.proxy.state import ProxyState

_MOST_OPEN = 32
_PATIENCE = 5.0  # seconds for a question, and for its answer; a kubelet has less


class CapturedReadiness:
    """`came` is called for each connection that has come through the rules."""

    def __init__(self, answers: Answers, came: Callable[[IpFamily], None]) -> None:
        self._answers = answers
        self._came = came
        self._open = 0

    async def handle(self, stream: trio.SocketStream) -> None:
        """One that came through the rules."""
        self._came("ipv6" if stream.socket.family == socket.AF_INET6 else "ipv4")
        await self.answer(stream)

    async def answer(self, stream: trio.SocketStream) -> None:
        """One that came, however it did; closes it at once when there are too many."""
        if self._open >= _MOST_OPEN:
            await stream.aclose()
            return
        self._open += 1
        try:
            await serve(stream, self._answer, _PATIENCE, once=True)
        finally:
            self._open -= 1

    async def _answer(self, request: h11.Request) -> Answer:
        if request.target.partition(b"?")[0] == b"/readyz":
            return await readyz(self._answers)
        return Answer(404, b"try /readyz\n")


def asks_for_readiness(target: Address, state: ProxyState) -> bool:
    """Whether what the inbound proxy got was meant for nobody but itself."""
    port = state.settings.capture.readiness_port
    # Linux lets a client dial port 0, which is what says that the setting is off.
    return bool(port) and target.port == port and state.is_local(target.host)


def pass_on(client: socket.socket, record: Record, state: ProxyState) -> None:
    """To who answers for all processes of the sidecar. It is nobody's traffic."""
    record.end(Reason.OK, EndedBy.PROXY, "asks for readiness")
    record.hidden = True
    state.answer_readiness(socket.socket(fileno=client.detach()))
