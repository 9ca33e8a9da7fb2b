"""Log levels that are changed while the sidecar runs, and go back by themselves."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import trio

from meshnet.model.admin import SUBSYSTEMS, LogLevel, LogLevelList, Refused, SetLogLevel

_log = logging.getLogger("meshnet.admin")

_ALL = "all"


@dataclass(frozen=True, slots=True, eq=False)
class _Change:
    """`until` is of trio's clock; infinite: for good."""

    request: SetLogLevel
    until: float


class LogLevels:
    """Of this process. Needs a trio run, of which a system task ends what is to end."""

    def __init__(self) -> None:
        self._changes: dict[str, _Change] = {}

    def told(self) -> LogLevelList:
        """What is in force: for all, and for each subsystem."""
        return LogLevelList(items=tuple(map(self._told, ("", *SUBSYSTEMS))))

    def set(self, request: SetLogLevel) -> LogLevelList | Refused:
        if request.subsystem not in ("", *SUBSYSTEMS):
            return Refused(error=f"no subsystem {request.subsystem}", fix=f"there are {', '.join(SUBSYSTEMS)}")
        if request.level is None:
            self._take_back(request.subsystem)
            return self.told()
        lasts = request.seconds or float("inf")
        change = self._changes[request.subsystem] = _Change(request, trio.current_time() + lasts)
        _logger(request.subsystem).setLevel(request.level.upper())
        if request.seconds:
            trio.lowlevel.spawn_system_task(self._end, change)
        _log.info("log level of %s: %s", request.subsystem or _ALL, request.level)
        return self.told()

    def requests(self) -> Iterator[SetLogLevel]:
        """What brings another process to the same levels."""
        for change in self._changes.values():
            left = change.until - trio.current_time()
            seconds = left if left < float("inf") else 0.0
            yield SetLogLevel(subsystem=change.request.subsystem, level=change.request.level, seconds=seconds)

    def _told(self, subsystem: str) -> LogLevel:
        change = self._changes.get(subsystem)
        left = change.until - trio.current_time() if change is not None else float("inf")
        return LogLevel(
            subsystem=subsystem or _ALL,
            level=logging.getLevelName(_logger(subsystem).getEffectiveLevel()).lower(),
            is_set=change is not None,
            seconds_left=round(left, 1) if left < float("inf") else None,
        )

    async def _end(self, change: _Change) -> None:
        await trio.sleep_until(change.until)
        if self._changes.get(change.request.subsystem) is change:
            self._take_back(change.request.subsystem)

    def _take_back(self, subsystem: str) -> None:
        if self._changes.pop(subsystem, None) is not None:
            _logger(subsystem).setLevel(logging.NOTSET)
            _log.info("log level of %s: as before", subsystem or _ALL)


def _logger(subsystem: str) -> logging.Logger:
    return logging.getLogger(f"meshnet.{subsystem}" if subsystem else "meshnet")
