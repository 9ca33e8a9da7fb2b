"""What `meshnet check` says of one thing that it has looked at."""

from typing import Literal

import msgspec


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """`code` stays what it is from version to version."""

    code: str
    level: Literal["ok", "warning", "error"]
    what: str
    why: str = ""
    fix: str = ""


def unseen(code: str, what: str, why: str) -> Finding:
    """Of what this user may not look at."""
    return Finding(code=code, level="warning", what=what, why=why, fix="sudo meshnet check")
