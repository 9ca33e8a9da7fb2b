"""The program of one worker. Its parent alone says when it is to end.

A signal may reach parent and workers at once, from a terminal or an init system, and the parent passes on what it gets:
obeyed twice, it would cut what is open.
"""

import logging
import signal
import sys

import trio

from meshnet.errors import CommandError
from meshnet.model.duration import parse_duration
from meshnet.net import sockets
from meshnet.proxy.admin import AdminServer
from meshnet.proxy.answers import OwnAnswers
from meshnet.proxy.front import guarded
from meshnet.proxy.log import log_to_stderr
from meshnet.proxy.record import number_in_letters
from meshnet.proxy.sidecar import Sidecar, a_sidecar
from meshnet.proxy.workers.line import Brief, WorkersEnd

_log = logging.getLogger("meshnet.proxy")


def main(descriptor: int) -> int:
    """`descriptor`: the worker's end of the line."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with WorkersEnd(descriptor) as line:
        brief = line.brief()
        if brief is None:
            return 0
        log_to_stderr(brief.settings.log.level, f"worker {brief.number}: ")
        try:
            trio.run(_serve, brief, line)
        except CommandError as error:
            _log.error("%s: %s", error.what, error.why)
            return error.code
    return 0


async def _serve(brief: Brief, line: WorkersEnd) -> None:
    listeners = {name: list(map(sockets.inherited, found)) for name, found in brief.listeners.items()}
    suffix = number_in_letters(brief.number)
    one = a_sidecar(
        brief.settings, listeners, id_suffix=suffix, log_lock=brief.log_lock, ticket_secret=brief.ticket_secret
    )
    async with (
        one as sidecar,
        trio.open_nursery() as nursery,
    ):
        sidecar.state.answer_readiness = line.pass_on
        nursery.start_soon(_obey, line, sidecar)
        await sidecar.serve()
        nursery.cancel_scope.cancel()


async def _obey(line: WorkersEnd, sidecar: Sidecar) -> None:
    server = AdminServer(OwnAnswers(sidecar, {}))
    async with trio.open_nursery() as nursery:
        async for stream in line.calls():
            nursery.start_soon(guarded(server.handle), stream)
        _log.warning("the parent is gone: the ports are given up, and what is open may end by itself")
        sidecar.stop_accepting()
        if not sidecar.is_to_end:
            sidecar.ask_drain(parse_duration(sidecar.state.settings.proxy.drain_timeout))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
