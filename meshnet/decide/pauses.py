"""How long to wait before a process that died is started again."""


class Pauses:
    """Each is twice as long as the one before, in seconds; who lived long is a newcomer again."""

    FIRST, LONGEST = 0.2, 30.0
    STEADY = 60.0  # seconds alive after which the next death is the first again

    __slots__ = ("_next",)

    def __init__(self) -> None:
        self._next = self.FIRST

    def after(self, lived: float) -> float:
        """The pause after a death; `lived`: how long, in seconds."""
        pause = self.FIRST if lived > self.STEADY else self._next
        self._next = min(pause * 2, self.LONGEST)
        return pause
