"""Checks of single values that types cannot make: ports, durations, addresses, identities."""

import ipaddress
import re
from dataclasses import dataclass, field

from meshnet.codec.problem import Path, Problem, quoted
from meshnet.model.address import canonical_host, is_dns_name
from meshnet.model.duration import parse_duration
from meshnet.model.identity import is_spiffe_id
from meshnet.model.service import MOST_CHECKED

_NAME = re.compile(r"[a-z0-9](?:[-a-z0-9.]{0,251}[a-z0-9])?")
_YEAR = 366 * 86400.0


@dataclass(slots=True)
class Fields:
    """Reads values and notes what is wrong with them. A wrong value reads as something harmless: who finds `problems`
    throws the result away.
    """

    problems: list[Problem] = field(default_factory=list)

    def wrong(self, path: Path, text: str, suggestion: str = "") -> None:
        self.problems.append(Problem(path, text, suggestion))

    def number(self, path: Path, value: int, least: int, most: int = 2**31 - 1) -> int:
        if not least <= value <= most:
            self.wrong(path, f"{str(value)[:40]} is not between {least} and {most}")
        return value

    def count(self, path: Path, value: int) -> int:
        return self.number(path, value, 0)

    def some(self, path: Path, value: int) -> int:
        return self.number(path, value, 1)

    def port(self, path: Path, value: int) -> int:
        return self.number(path, value, 1, 65535)

    def fraction(self, path: Path, value: float, least: float = 0.0, most: float = 1.0) -> float:
        if not least <= value <= most:
            self.wrong(path, f"{str(value)[:40]} is not between {least:g} and {most:g}")
        return value

    def share(self, path: Path, value: float) -> float:
        return self.fraction(path, value)

    def duration(self, path: Path, text: str, *, zero: bool = False) -> float:
        """Seconds; `zero`: whether no time at all makes sense."""
        try:
            seconds = parse_duration(text)
        except ValueError:
            hint = f"write {quoted(text + 's')}" if text.isdecimal() else ""
            self.wrong(path, f"{quoted(text)} is not a duration such as 250ms, 3s, 5m or 1h30m", hint)
            return 1.0
        if seconds > _YEAR or (seconds == 0 and not zero):
            self.wrong(path, f"{quoted(text)} is {'too long' if seconds else 'no time at all'}")
        return seconds

    def words(self, path: Path, text: str) -> str:
        """What is said to an application, or by one: a few bytes of UTF-8."""
        if not 0 < len(text.encode("utf-8", "replace")) <= MOST_CHECKED:
            self.wrong(path, f"{quoted(text)} is not 1 to {MOST_CHECKED} bytes")
        return text

    def wait(self, path: Path, text: str) -> float:
        """A duration, or none at all."""
        return self.duration(path, text, zero=True)

    def host(self, path: Path, text: str) -> str:
        """The canonical text of an IP address that a connection can go to."""
        try:
            host = canonical_host(text)
        except ValueError:
            without_port = text.rpartition(":")[0].strip("[]")
            hint = f"write {quoted(without_port)}: ports are given apart" if _is_address(without_port) else ""
            self.wrong(path, f"{quoted(text)} is not an IP address", hint)
            return text
        address = ipaddress.ip_address(host)
        if address.is_unspecified or address.is_multicast or "%" in host:
            self.wrong(path, f"{quoted(text)} is not an address of one host")
        return host

    def host_or_name(self, path: Path, text: str) -> str:
        """As `host`, or a DNS name in small letters."""
        if is_dns_name(text):
            return text.lower()
        without_port = text.rpartition(":")[0]
        if _is_address(text) or _is_address(without_port.strip("[]")):
            return self.host(path, text)
        hint = f"write {quoted(without_port)}: ports are given apart" if is_dns_name(without_port) else ""
        self.wrong(path, f"{quoted(text)} is neither an IP address nor a DNS name", hint)
        return text

    def network(self, path: Path, text: str) -> str:
        """The canonical text of a CIDR."""
        try:
            return str(ipaddress.ip_network(text))
        except ValueError:
            pass
        try:
            hint = f"did you mean {quoted(str(ipaddress.ip_network(text, strict=False)))}?"
        except ValueError:
            hint = ""
        self.wrong(path, f"{quoted(text)} is not a network such as 10.0.0.0/8", hint)
        return text

    def identity(self, path: Path, text: str) -> str:
        if not is_spiffe_id(text):
            hint = f"did you mean {quoted('spiffe://' + text)}?" if is_spiffe_id("spiffe://" + text) else ""
            self.wrong(path, f"{quoted(text)} is not a SPIFFE id such as spiffe://prod/ns/default/sa/web", hint)
        return text

    def principal(self, path: Path, text: str) -> str:
        """A SPIFFE id, or the beginning or end of one, marked by a `*`."""
        if text == "*":
            return text
        if text.endswith("*"):
            begins_well = text.startswith("spiffe://") and is_spiffe_id(_completed(text[:-1]))
            if not begins_well:
                self.wrong(path, f"{quoted(text)} begins no SPIFFE id: write it like spiffe://prod/ns/default/*")
        elif text.startswith("*"):
            if not is_spiffe_id("spiffe://x/x" + text[1:]):
                self.wrong(path, f"{quoted(text)} ends no SPIFFE id: write it like */sa/web")
        else:
            self.identity(path, text)
        return text

    def name(self, path: Path, text: str) -> str:
        if not _NAME.fullmatch(text):
            self.wrong(path, f"{quoted(text)} is not a name: use a-z, 0-9, - and ., at most 253 of them")
        return text


def _completed(beginning: str) -> str:
    """Some SPIFFE id that starts like this, if there is one."""
    path = beginning.removeprefix("spiffe://")
    return beginning + ("x" if "/" in path else "x/x")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
