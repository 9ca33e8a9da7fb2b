"""The parent: it holds the listeners, keeps the workers alive, and answers for them."""

import os
from contextlib import ExitStack
from itertools import chain

import trio

from meshnet.model.settings import Settings
from meshnet.proxy.capture import CaptureProof
from meshnet.proxy.front import front
from meshnet.proxy.listen import OWN, Listeners, addresses_of
from meshnet.proxy.workers.answers import JointAnswers
from meshnet.proxy.workers.sums import Totals
from meshnet.proxy.workers.worker import Worker


async def run(settings: Settings, listeners: Listeners) -> None:
    """Until every worker has drained and ended. Raises CommandError if it cannot start."""
    told = addresses_of(listeners) | {"admin": settings.admin.socket}
    shared = {name: found for name, found in listeners.items() if name not in OWN}
    totals = Totals()
    with ExitStack() as stack:
        log_lock = os.memfd_create("access-log")
        stack.callback(os.close, log_lock)
        secret = os.urandom(32)
        workers = [
            Worker(number, settings, shared, log_lock, secret, totals.died)
            for number in range(1, settings.proxy.workers + 1)
        ]

        def stop_listening() -> None:
            for sock in chain(*shared.values()):
                sock.close()

        capture = CaptureProof(settings, lambda: [os.getpid(), *(worker.pid for worker in workers if worker.pid)])
        answers = JointAnswers(workers, totals, settings, told, stop_listening, capture)
        async with (
            front(settings, told, listeners, answers, capture) as answer_readiness,
            trio.open_nursery() as nursery,
        ):
            for worker in workers:
                worker.answer_readiness = answer_readiness
                nursery.start_soon(worker.run)
