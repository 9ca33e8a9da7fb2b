"""The sidecar as a program: one process, or a parent with workers."""

import os
from contextlib import ExitStack

from meshnet.model.settings import Settings
from meshnet.proxy.answers import OwnAnswers
from meshnet.proxy.capture import CaptureProof
from meshnet.proxy.front import front
from meshnet.proxy.listen import addresses_of, open_listeners
from meshnet.proxy.sidecar import a_sidecar
from meshnet.proxy.workers import parent


async def run(settings: Settings) -> None:
    """Runs a sidecar until SIGTERM or SIGINT and the drain that follows. Raises CommandError if it cannot start."""
    with ExitStack() as stack:
        listeners = open_listeners(settings, stack)
        if settings.proxy.workers > 1:
            await parent.run(settings, listeners)
            return
        told = addresses_of(listeners) | {"admin": settings.admin.socket}
        capture = CaptureProof(settings, lambda: [os.getpid()])
        async with a_sidecar(settings, listeners) as sidecar:
            answers = OwnAnswers(sidecar, told, capture)
            async with front(settings, told, listeners, answers, capture) as answer_readiness:
                sidecar.state.answer_readiness = answer_readiness
                await sidecar.serve()
