"""What the core says of connections that passed, as it says it of those of which there is more to say."""

import time

from meshnet.relay import Facts
from meshnet.relay.rows import Rows

PASSED = 6


def facts_of(rows: Rows) -> list[Facts]:
    """Times to a microsecond."""
    epoch = time.time() - time.monotonic()
    by = list(type(rows.ended_by)).index(rows.ended_by)
    found = []
    for row in rows:
        opened = row.opened / 1e6 - epoch
        ended = opened + row.ended / 1e6
        moved = ended - row.idle / 1e6
        times = (opened, opened + row.connected / 1e6, ended)
        seen = (row.port, *times, row.sent, row.received, moved)
        found.append(Facts(*seen, True, True, 0, by, 0, False, -1, row.id, rows.cipher))
    return found
