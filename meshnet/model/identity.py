"""Who a workload is: a SPIFFE id (https://spiffe.io, SPIFFE-ID standard, part 2)."""

import re

_SPIFFE = re.compile(r"spiffe://(?P<domain>[a-z0-9._-]{1,255})(?P<path>(?:/[A-Za-z0-9._-]+)+)")
_MAX_LENGTH = 2048


def is_spiffe_id(text: str) -> bool:
    """Whether `text` is a SPIFFE id with a path; `.` and `..` segments are not allowed."""
    match = _SPIFFE.fullmatch(text)
    return match is not None and len(text) <= _MAX_LENGTH and not {".", ".."} & set(match["path"].split("/"))


def trust_domain(identity: str) -> str:
    """`prod` of `spiffe://prod/ns/default/sa/web`; empty if `identity` is not a SPIFFE id."""
    match = _SPIFFE.fullmatch(identity)
    return match["domain"] if match else ""


def is_trust_domain(text: str) -> bool:
    return trust_domain(f"spiffe://{text}/x") == text != ""


def short_name(identity: str) -> str:
    """What a table shows: `web` of `spiffe://prod/ns/default/sa/web`."""
    return identity.rpartition("/")[2]


def spiffe_id(domain: str, namespace: str, account: str) -> str:
    """The id of a service account, in the shape that Istio and Linkerd share."""
    return f"spiffe://{domain}/ns/{namespace}/sa/{account}"
