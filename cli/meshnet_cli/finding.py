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
