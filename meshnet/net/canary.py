"""A connection to nobody's address. Whether it can leave is known at once; the answer tells if it was captured."""

import errno
import os
import socket

from meshnet.model.address import Address

# There was no packet that a rule could have matched.
_NO_ROUTE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EACCES, errno.ENETDOWN})
_NO_FAMILY = errno.EAFNOSUPPORT


def begin_connect(target: Address, mark: int = 0, sock: socket.socket | None = None) -> socket.socket | None:
    """A non-blocking socket that has begun to connect; None where this host has no way there. Raises OSError.

    `mark` is that of its packets, if this process may set one. `sock` is to be used, if it is given.
    """
    try:
        sock = sock or socket.socket(socket.AF_INET6 if target.is_v6 else socket.AF_INET, socket.SOCK_STREAM)
    except OSError as error:
        if error.errno == _NO_FAMILY:
            return None
        raise
    sock.setblocking(False)
    if mark:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    code = sock.connect_ex((target.host, target.port))
    if code in (0, errno.EINPROGRESS):
        return sock
    sock.close()
    if code in _NO_ROUTE:
        return None
    raise OSError(code, os.strerror(code))
