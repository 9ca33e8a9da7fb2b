"""Readiness that is asked for through the rules, at a port where nobody listens (capture.readiness_port).

It takes inbound capture to come here: where the rules are gone the question is refused, and whoever asks, a kubelet
say, takes readiness away after as many refusals as he wants to see. No policy is asked, and nothing else can be reached
by it: one question, of a few kilobytes and seconds, has one answer, whether the whole sidecar is ready. Why it is not
the health port's /readyz tells.
"""

import select
import socket
from collections.abc import Callable

import h11
import trio

from meshnet.errors import EndedBy, Reason
from meshnet.model.address import Address
from meshnet.model.canary import IpFamily
from meshnet.proxy.admin import Answers
from meshnet.proxy.http import Answer, serve
from meshnet.proxy.record import Record
from meshnet.proxy.state import ProxyState

_MOST_OPEN = 32
_PATIENCE = 5.0  # seconds for a question, and for its answer; a kubelet has less


class CapturedReadiness:
    """`came` is called for each question that has come through the rules."""

    def __init__(self, answers: Answers, came: Callable[[IpFamily], None]) -> None:
        self._answers = answers
        self._came = came
        self._open: set[trio.CancelScope] = set()
        self._silent: dict[trio.CancelScope, int] = {}  # those that have not asked yet, the oldest first; descriptors

    async def handle(self, stream: trio.SocketStream) -> None:
        """One that came through the rules."""
        family: IpFamily = "ipv6" if stream.socket.family == socket.AF_INET6 else "ipv4"
        await self._serve(stream, lambda: self._came(family))

    async def answer(self, stream: trio.SocketStream) -> None:
        """One that came, however it did."""
        await self._serve(stream, lambda: None)

    async def _serve(self, stream: trio.SocketStream, came: Callable[[], None]) -> None:
        """Closes it at once when there are too many that wait for an answer."""
        if len(self._open) >= _MOST_OPEN and not self._let_one_go():
            await stream.aclose()
            return
        with trio.CancelScope() as scope:
            self._open.add(scope)
            self._silent[scope] = stream.socket.fileno()

            async def answer(request: h11.Request) -> Answer:
                self._silent.pop(scope, None)
                if request.target.partition(b"?")[0] != b"/readyz":
                    return Answer(404, b"try /readyz\n")
                came()
                why_not = await self._answers.not_ready_because()  # names clients of this host, to whoever asks
                return Answer(503, b"not ready\n") if why_not else Answer(200, b"ok\n")

            try:
                await serve(stream, answer, _PATIENCE, once=True)
            finally:
                self._open.discard(scope)
                self._silent.pop(scope, None)

    def _let_one_go(self) -> bool:
        """Who says nothing is in nobody's way: a kubelet asks at once."""
        poll = select.poll()
        for descriptor in self._silent.values():
            poll.register(descriptor, select.POLLIN)
        heard = {descriptor for descriptor, _ in poll.poll(0)}  # what has come and is not read yet may be a question
        oldest = next((scope for scope, descriptor in self._silent.items() if descriptor not in heard), None)
        if oldest is None:
            return False
        del self._silent[oldest]
        self._open.discard(oldest)
        oldest.cancel()
        return True


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
