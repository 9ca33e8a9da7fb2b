"""Why the core is not here, and what mends it."""

from typing import NamedTuple

_OPENSSL = "libssl.so.3"


class Missing(NamedTuple):
    """Both are parts of a sentence, for an operator."""

    why: str
    fix: str


def missing(error: ImportError) -> Missing:
    """What it means that `from meshnet.relay.native import _core` raised `error`.

    Its name tells: handles.c names OpenSSL; Python the package that has no such file, or the file that it cannot load.
    """
    if error.name == _OPENSSL:
        return Missing(str(error), "install the libraries of OpenSSL 3, say by apt-get install libssl3")
    if error.name == __package__:
        return Missing("not built", "install gcc, libc6-dev and Python's headers (python3-dev), then meshnet again")
    return Missing(f"built, but not for this machine: {error}", "install meshnet again, on this machine")
