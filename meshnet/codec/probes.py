"""The checks of the probe relay as one line of JSON, as `meshnet inject` writes them and a sidecar reads them."""

import re
from collections.abc import Mapping

import msgspec

from meshnet.model.probe import ENDPOINTS, Check, HttpCheck

_NAME = re.compile(rf"[a-z0-9](?:[-a-z0-9]{{0,61}}[a-z0-9])?/(?:{'|'.join(ENDPOINTS.values())})")  # RFC 1123 label
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a token of RFC 9110, 5.6.2
_HEADER_VALUE = re.compile(r"(?:[\x21-\x7e](?:[\x20-\x7e\t]*[\x21-\x7e])?)?")
_PATH = re.compile(r"/[\x21-\x7e]*")
_LONGEST = 3600  # seconds

Checks = Mapping[str, Check]
"""By name."""


def read_checks(text: str) -> dict[str, Check]:
    """None for an empty text. Raises ValueError that says what is wrong."""
    if not text:
        return {}
    try:
        checks = msgspec.json.decode(text, type=dict[str, Check])
    except msgspec.DecodeError as error:
        raise ValueError(f"not the checks of the probe relay: {error}") from None
    for name, check in checks.items():
        if problem := _problem(name, check):
            raise ValueError(f"{name}: {problem}")
    return checks


def write_checks(checks: Checks) -> str:
    """What `read_checks` reads."""
    return msgspec.json.encode(checks, order="sorted").decode() if checks else ""


def _problem(name: str, check: Check) -> str:
    if _NAME.fullmatch(name) is None:
        return f"not a name such as web/{' or web/'.join(ENDPOINTS.values())}"
    if not 1 <= check.port <= 65535:
        return f"{check.port} is not a port"
    if not 1 <= check.timeout <= _LONGEST:
        return f"{check.timeout} is not a time-out from 1 to {_LONGEST} seconds"
    if isinstance(check, HttpCheck):
        if _PATH.fullmatch(check.path) is None:
            return f"{check.path!r} is not the path of a URL, which has a / first and no spaces"
        for header, value in check.headers:
            if _HEADER_NAME.fullmatch(header) is None:
                return f"{header!r} is not the name of a header"
            if _HEADER_VALUE.fullmatch(value) is None:
                return f"{value!r} cannot be the value of the header {header}"
    return ""
