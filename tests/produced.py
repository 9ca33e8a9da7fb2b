"""The reasons that records have told during a test: what a test says that it produces, it has to have seen."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from meshnet.model.connection import Connection

_told: set[str] = set()


def note(records: Iterable[Connection]) -> None:
    """Records as a sidecar gives them."""
    _told.update(record.reason.code for record in records if record.reason is not None)


@contextmanager
def has_to_be_told(reasons: Iterable[str]) -> Iterator[None]:
    """Raises AssertionError unless a record of each is noted within."""
    _told.clear()
    yield
    missing = set(reasons) - _told
    assert not missing, f"no record has ended with {', '.join(sorted(missing))}, as the mark `produces` says"
