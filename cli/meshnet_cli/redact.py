"""Addresses, names and identities of a text by pseudonyms: the same thing by the same one, wherever it stands. Pure."""

import ipaddress
import re
from collections.abc import Iterable
from typing import Any

from meshnet.model.canary import CANARY, INBOUND_CANARY, OWN_CANARY

_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_SPIFFE = re.compile(r"spiffe://([a-z0-9._-]+)((?:/[A-Za-z0-9._-]+)*)")
_V4 = r"(?<!\d)(?<!\d\.)\d{1,3}(?:\.\d{1,3}){3}(?!\d|\.\d)"
_COLONS = r"[0-9A-Fa-f]*:[0-9A-Fa-f:]*:[0-9A-Fa-f]*"  # IPv6, or a time, or an address with more around it
_ADDRESS = re.compile(rf"(?P<mapped>::[Ff]{{4}}:)(?P<within>{_V4})|(?P<v4>{_V4})|(?P<colons>{_COLONS})")

# Nobody's, and the same everywhere.
_KNOWN = frozenset(
    ipaddress.ip_address(host) for hosts in (CANARY, OWN_CANARY, INBOUND_CANARY) for host in hosts.values()
)
_FIRST_V4, _FIRST_V6 = ipaddress.IPv4Address("198.18.0.0"), ipaddress.IPv6Address("100::")  # RFC 2544, RFC 6666
_USUAL = frozenset({"", "-", "default", "unknown", "other", "localhost"})  # say nothing of anybody
_OF_PATH = {"ns": "namespace", "sa": "account"}

# Fields whose values are words of meshnet's own, or of the kernel's.
_WORDS = frozenset(
    (
        "action",
        "apiVersion",
        "breaker",
        "chain",
        "cipher",
        "code",
        "direction",
        "endedBy",
        "family",
        "kind",
        "level",
        "mode",
        "name",
        "phase",
        "reporter",
        "response_flags",
        "result",
        "route",
        "state",
        "tunnel",
        "type",
        "verdict",
        "version",
    )
)
_ADDRESSED = frozenset({"match"})  # addresses stand among words of nft
_NAMES = {
    "node": "host",
    "service": "service",
    "destination_service": "service",
    "policy": "policy",
    "dnsName": "dns-name",
    "source_workload": "account",
    "destination_workload": "account",
    "source_workload_namespace": "namespace",
    "destination_workload_namespace": "namespace",
}
"""Fields that hold nothing but the name of something, and of what."""


def without_keys(text: str) -> str:
    """Whatever a private key is doing there."""
    return _PRIVATE_KEY.sub("(a private key was removed here)", text)


class Redactor:
    """`learn` names from all documents first: a log line does not say which of its words is one."""

    def __init__(self, hosts: Iterable[str] = ()) -> None:
        self._pseudonyms: dict[str, str] = {}
        self._counts: dict[str, int] = {}
        self._addresses: dict[str, str] = {}
        self._pattern: re.Pattern[str] | None = None
        for host in hosts:
            self._pseudonyms[host.partition(".")[0]] = self._name("host", host)

    def learn(self, value: Any) -> None:
        """Of what JSON is made of."""
        for key, text in _strings("", value):
            if (kind := _NAMES.get(key)) is not None:
                namespace, _, name = text.rpartition("/")
                self._name("namespace", namespace)
                self._name(kind, name.partition(":")[0])
            for match in _SPIFFE.finditer(text):
                self._identity(match)

    def value(self, value: Any) -> Any:
        """The same, redacted; keys, numbers and words of meshnet's own stay."""
        return self._value("", value)

    def text(self, text: str) -> str:
        text = _ADDRESS.sub(self._found, _SPIFFE.sub(self._identity, text))
        if self._pattern is None:
            longest_first = sorted(self._pseudonyms, key=len, reverse=True)
            self._pattern = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})(?![\w-])")
        return self._pattern.sub(lambda match: self._pseudonyms[match[0]], text)

    def _value(self, key: str, value: Any) -> Any:
        if isinstance(value, str):
            if key in _ADDRESSED:
                return _ADDRESS.sub(self._found, value)
            return value if key in _WORDS else self.text(value)
        if isinstance(value, dict):
            return {name: self._value(name, each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._value(key, each) for each in value]
        return value

    def _name(self, kind: str, name: str) -> str:
        if name in _USUAL or name in self._pseudonyms.values():
            return name
        if name not in self._pseudonyms:
            self._pseudonyms[name] = self._next(kind)
            self._pattern = None
        return self._pseudonyms[name]

    def _next(self, kind: str) -> str:
        self._counts[kind] = self._counts.get(kind, 0) + 1
        return f"{kind}-{self._counts[kind]}"

    def _identity(self, match: re.Match[str]) -> str:
        domain, path = match[1], match[2].split("/")[1:]
        parts, before = [self._name("domain", domain)], ""
        for part in path:
            parts.append(part if part in _OF_PATH else self._name(_OF_PATH.get(before, "name"), part))
            before = part
        return "spiffe://" + "/".join(parts)

    def _found(self, match: re.Match[str]) -> str:
        if v4 := match["within"] or match["v4"]:
            return (match["mapped"] or "") + (self._address(v4) or v4)
        return self._v6(match["colons"])

    def _v6(self, run: str) -> str:
        """With the longest part of it that is an address by its pseudonym."""
        starts = [0, *(at + 1 for at, character in enumerate(run) if character == ":")]
        ends = [len(run), *(at for at in range(len(run) - 1, 0, -1) if run[at] == ":")]
        for start in starts:
            for end in ends:
                if end > start and (pseudonym := self._address(run[start:end])) is not None:
                    return run[:start] + pseudonym + run[end:]
        return run

    def _address(self, text: str) -> str | None:
        """None if it is none. Loopback, any address and canaries stay as they are."""
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            return None
        if address.is_loopback or address.is_unspecified or address in _KNOWN:
            return text
        if address.compressed not in self._addresses:
            first = _FIRST_V4 if address.version == 4 else _FIRST_V6
            self._addresses[address.compressed] = str(first + int(self._next(f"v{address.version}").partition("-")[2]))
        return self._addresses[address.compressed]


def _strings(key: str, value: Any) -> Iterable[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _strings(name, each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings(key, each)
