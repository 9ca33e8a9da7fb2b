"""Which relay moves the bytes: the fastest that can run here, or the one that was asked for."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from meshnet.errors import CommandError
from meshnet.relay import Relays
from meshnet.relay.native import MISSING, NativeRelay
from meshnet.relay.python import PythonRelay


@asynccontextmanager
async def best_relay(wanted: str, threads: int, ticket_secret: bytes = b"") -> AsyncIterator[Relays]:
    """`wanted`: native, python or auto. `threads`: of the Python relay. Raises CommandError: it cannot be had.

    `ticket_secret`: of all processes that serve the same ports; the native relay resumes their TLS sessions with it.
    """
    if wanted == "native" and MISSING:
        raise CommandError(
            "the native relay was asked for and is not here",
            why=MISSING,
            fix='set relay = "auto" in [proxy]; it is built by pip where there is a C compiler and Python\'s headers',
        )
    if wanted == "python" or MISSING:
        async with PythonRelay(threads) as python:
            yield Relays([python], missing={"native": MISSING or "the settings ask for python"})
    else:
        async with NativeRelay(ticket_secret) as native:
            yield Relays([native], missing={"python": "native is faster"})
