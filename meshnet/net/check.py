"""One active check of an application: a connect, and if asked for, what is sent and what has to come back."""

import trio

from meshnet.errors import ConnectionFailed, Reason
from meshnet.model.address import Address
from meshnet.net import sockets
from meshnet.net.strand import in_task

_MOST_READ = 16384  # bytes in which what is expected has to stand


async def check_application(
    address: Address, *, send: bytes, expect: bytes, mark: int, timeout: float, local: bool
) -> None:
    """Raises ConnectionFailed if it does not do within `timeout` seconds what it should.

    The connection ends by RST: of a FIN, one side would keep a socket and both a conntrack entry for a minute.
    """
    until = trio.current_time() + timeout
    sock = await sockets.connect(address, mark=mark, timeout=timeout, local=local)
    try:
        if not send and not expect:
            return
        await in_task()
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        heard = b""
        with trio.move_on_at(until):
            await stream.send_all(send)
            while expect not in heard:
                if len(heard) >= _MOST_READ or not (more := await stream.receive_some(_MOST_READ)):
                    raise ConnectionFailed(Reason.CONNECT_REFUSED, f"{address} {_instead(heard)}")
                heard += more
            return
        raise ConnectionFailed(Reason.CONNECT_TIMEOUT, f"{address} {_instead(heard)} within {timeout:g} s")
    except trio.BrokenResourceError as error:
        raise ConnectionFailed(Reason.CONNECT_REFUSED, f"{address} broke the connection: {error}") from error
    finally:
        sockets.reset(sock)


def _instead(heard: bytes) -> str:
    said = heard[:40].decode("ascii", "backslashreplace")
    return f"answered {said!r}, not what is expected" if heard else "did not answer"
