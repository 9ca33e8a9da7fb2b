"""This sidecar's certificate: read at start, read again whenever its files change."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import trio

from meshnet.model.admin import CertificateStatus
from meshnet.model.settings import IdentitySection
from meshnet.net import tls

_log = logging.getLogger("meshnet.identity")

_LOOK_EVERY = 2.0  # seconds; three stat calls. Watching directories would miss a mount swapped underneath.

_Stamp = tuple[tuple[int, int, int] | None, ...]


class Identity:
    """`credentials` is None until there is a pair that fits; a bad renewal leaves the good one in force."""

    def __init__(self, settings: IdentitySection, secure: tls.Tls) -> None:
        self._secure = secure
        self._files = (settings.certificate, settings.key, settings.bundle)
        self._stamp: _Stamp | None = None
        self.credentials: tls.Credentials | None = None
        self.problem = ""

    @property
    def name(self) -> str:
        """The SPIFFE id, or nothing."""
        return self.credentials.identity if self.credentials else ""

    def refresh(self) -> bool:
        """Reads the files again if they changed. Whether there are new credentials."""
        stamp = tuple(_stamp(file) for file in self._files)
        if stamp == self._stamp:
            return False
        try:
            credentials = tls.load_credentials(*self._files, self._secure)
        except (OSError, ValueError) as error:
            # Three files cannot be replaced in one step: a mismatch is looked at again until it fits.
            missing = next((file for file in self._files if _stamp(file) is None), "")
            self.problem = f"there is no {missing}" if missing else str(error)
            return False
        self._stamp = stamp
        self.credentials = credentials
        self.problem = ""
        return True

    async def watch(self, renewed: Callable[[], None]) -> None:
        """Calls `renewed` for each new certificate, for ever."""
        told = self.problem
        while True:
            await trio.sleep(_LOOK_EVERY)
            if self.refresh():
                _log.info("certificate of %s renewed", self.name)
                renewed()
            if self.problem != told:
                told = self.problem
                if told:
                    _log.warning("certificate not taken: %s", told)

    def status(self) -> CertificateStatus:
        held = self.credentials
        if held is None:
            return CertificateStatus(problem=self.problem)
        now = time.time()
        invalid = held.problem(now)
        return CertificateStatus(
            identity=held.identity,
            issuer=held.issuer,
            serial=held.serial,
            not_before=tls.utc(held.not_before),
            not_after=tls.utc(held.not_after),
            begins_in_seconds=round(max(0.0, held.not_before - now), 1),
            expires_in_seconds=round(held.not_after - now, 1),
            problem=self.problem or (invalid and f"it {invalid}"),
        )


def _stamp(file: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(Path(file))
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
