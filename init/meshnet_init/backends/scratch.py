"""A network namespace to try things in, so that nothing of it is ever seen by anybody."""

import ctypes
import threading
from collections.abc import Callable

from meshnet.errors import CommandError

_CLONE_NEWNET = 0x40000000  # linux/sched.h


def tried_in_scratch(probe: Callable[[], str]) -> str:
    """What `probe` returns in a namespace of its own; here, where none may be made: that takes CAP_SYS_ADMIN.

    Raises CommandError, as `probe` does.
    """
    answers: list[str | CommandError] = []

    def run() -> None:  # a namespace is a thread's, and goes with it: unshare(2)
        ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET)
        try:
            answers.append(probe())
        except CommandError as error:
            answers.append(error)

    thread = threading.Thread(target=run, name="scratch")
    thread.start()
    thread.join()
    answer = answers[0]
    if isinstance(answer, CommandError):
        raise answer
    return answer
