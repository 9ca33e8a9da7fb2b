"""Lengths of time as people write them."""

import re

_PART = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>ms|s|m|h)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(text: str) -> float:
    """Seconds of `250ms`, `3s`, `5m`, `1h30m`. Raises ValueError; a unit is always required."""
    seconds, position = 0.0, 0
    while match := _PART.match(text, position):
        seconds += float(match["number"]) * _SECONDS[match["unit"]]
        position = match.end()
    if position == 0 or position != len(text):
        raise ValueError(f"{text!r} is not a duration such as 250ms, 3s, 5m or 1h30m")
    return seconds


def format_duration(seconds: float) -> str:
    """A duration that `parse_duration` reads back, to the millisecond."""
    milliseconds = round(seconds * 1000)
    if milliseconds % 1000:
        return f"{milliseconds}ms"
    whole = milliseconds // 1000
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    parts = [f"{hours}h" if hours else "", f"{minutes}m" if minutes else "", f"{left}s" if left else ""]
    return "".join(parts) or "0s"
