"""/metrics, /healthz and /readyz on port 15120."""

import h11
import trio
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from meshnet.proxy.admin import Answers
from meshnet.proxy.http import Answer, serve

_IDLE_TIMEOUT = 30.0  # seconds a client may be silent


class HealthServer:
    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    async def handle(self, stream: trio.SocketStream) -> None:
        """Serves one HTTP/1.1 connection, request after request."""
        await serve(stream, self._answer, _IDLE_TIMEOUT)

    async def _answer(self, request: h11.Request) -> Answer:
        path = request.target.partition(b"?")[0]
        if path == b"/metrics":
            return Answer(200, await self._answers.scrape(), CONTENT_TYPE_LATEST)
        if path == b"/healthz":
            return Answer(200, b"ok\n")
        if path == b"/readyz":
            problems = await self._answers.not_ready_because()
            return Answer(503, "\n".join(problems).encode() + b"\n") if problems else Answer(200, b"ok\n")
        return Answer(404, b"try /metrics, /healthz or /readyz\n")
