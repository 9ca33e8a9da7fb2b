"""Which relay moves the bytes: the fastest that can run here, or the one that was asked for."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from meshnet.errors import CommandError
from meshnet.relay import Relays
from meshnet.relay.native import MISSING, NativeRelay
from meshnet.relay.python import PythonRelay


def serving(wanted: str) -> tuple[str, dict[str, str]]:
    """The name of the relay that serves where `wanted` is asked for, and why another does not, as in Relays.missing.

    `wanted`: native, python or auto. Raises CommandError: it cannot be had.
    """
    if wanted == "native" and MISSING:
        raise CommandError(
            "the native relay was asked for and is not here",
            why=MISSING.why,
            fix=f'{MISSING.fix}; or set relay = "auto" in [proxy]',
        )
    if MISSING:
        return "python", {"native": MISSING.why}
    if wanted == "python":
        return "python", {"native": "the settings ask for python"}
    return "native", {"python": "native is faster"}


@asynccontextmanager
async def best_relay(
    wanted: str, threads: int, ticket_secret: bytes = b"", id_suffix: str = ""
) -> AsyncIterator[Relays]:
    """What `serving` says, running. `threads`: of the Python relay. Raises CommandError: it cannot be had.

    `ticket_secret`: of all processes that serve the same ports; the native relay resumes their TLS sessions with it.
    `id_suffix`: of the ids of connections that it dials by itself.
    """
    name, missing = serving(wanted)
    native = NativeRelay(ticket_secret, id_suffix=id_suffix)
    async with native if name == "native" else PythonRelay(threads) as relay:
        yield Relays([relay], missing)
