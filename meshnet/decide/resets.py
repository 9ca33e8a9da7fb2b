"""An endpoint in plain TCP that accepts connections, and resets each at once without a byte.

So does a sidecar that cannot reach its application: it has taken the connection by then. Who has declared that there
is none would never learn of it, for it looks like an application that resets.
"""

from meshnet.errors import EndedBy, Reason

SUSPICIOUS = 5  # in a row
_AT_ONCE = 0.1  # seconds, where a round trip takes less


class ResetsAtOnce:
    """How many connections to one endpoint have ended so in a row."""

    __slots__ = ("in_a_row",)

    def __init__(self) -> None:
        self.in_a_row = 0

    def note(self, reason: Reason, ended_by: EndedBy | None, received: int, seconds: float, round_trip: float) -> bool:
        """A connection that was up for so many seconds has ended. Whether that is to be told: once in a row."""
        if received or reason is Reason.OK:
            self.in_a_row = 0
        elif reason is Reason.PEER_RST and ended_by is EndedBy.SERVER and seconds <= max(_AT_ONCE, 2 * round_trip):
            self.in_a_row += 1
            return self.in_a_row == SUSPICIOUS
        return False
