"""What faults.c says of the calls of the native relay that it is linked with (builds.py), and makes of them."""

import contextlib
import ctypes
import errno
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from meshnet.relay.native import _core

MOST = 40  # calls of one kind that are tried, one after the other
EVER = 1 << 62
OURS = {errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC}
"""What this host lacks, so nobody at the other end is to be blamed."""


@dataclass
class Faults:
    """The relay's own library, which faults.c is a part of."""

    library: ctypes.CDLL

    def arm(self, call: str, code: int = 0, first: int = 1, last: int = 0) -> None:
        """The calls from the `first` to the `last`, by default that one only, fail with the errno `code`; 0: none."""
        self.library.faults_arm(call.encode(), ctypes.c_ulong(first), ctypes.c_ulong(last or first), code)

    def count(self, call: str) -> int:
        """Since it was armed."""
        return int(self.library.faults_count(call.encode()))

    def count_all(self) -> None:
        """As `arm` does for all of them, and none fails."""
        for call in self._calls():
            self.arm(call)

    def made(self) -> set[str]:
        """Those that were made since."""
        return {call for call in self._calls() if self.count(call)}

    def _calls(self) -> Iterator[str]:
        for number in itertools.count():
            name = self.library.faults_name(number)
            if name is None:
                return
            yield name.decode()


@contextlib.contextmanager
def watched() -> Iterator[Faults]:
    library = ctypes.CDLL(str(_core.__file__))
    library.faults_count.restype = ctypes.c_ulong
    library.faults_name.restype = ctypes.c_char_p
    yield Faults(library)
    library.faults_forget()
