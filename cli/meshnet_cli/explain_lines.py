"""What `meshnet explain HOST:PORT` prints: where a connection would be captured, where it would go, who is let in."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from meshnet.model.admin import Admission, AdmissionView, Candidate, RouteView
from meshnet_cli.explain_capture import CaptureExplanation, RuleStep

if TYPE_CHECKING:  # these reach for the kernel: --help must not wait for that
    from meshnet_init.foreign import Foreign


def capture_lines(it: CaptureExplanation) -> Iterator[str]:
    source = it.source or ("a program here" if it.direction == "outbound" else "elsewhere")
    yield f"{source} -> {it.target}  {it.direction}  {it.verdict}"
    yield ""
    for other in it.others:
        if other.ahead:
            yield f"first asked {_other(other)}"
    for step in it.unless:
        yield f"unless      {step.whom}: {_verdict(step)} by {rule_words(step)}"
    if it.rule is not None:
        yield f"decides     {rule_words(it.rule)}: {_verdict(it.rule)}, {it.rule.hits} hits"
    elif it.backend:
        yield "decides     no rule of ours is about it: left alone"
    for other in it.others:
        if not other.ahead:
            yield f"asked later {_other(other)}"
    if it.route is not None:
        yield from route_lines(it.route)
    if it.admission is not None:
        yield from _admission_lines(it.admission)
    for text in it.notes:
        yield f"note        {text}"
    for text in it.unread:
        yield f"not read    {text}"


def route_lines(route: RouteView) -> Iterator[str]:
    """Where a connection would go, and its endpoints, the best first."""
    count = len(route.candidates) + route.more
    among = f"{route.balance} among {count} endpoints" if route.route == "service" else route.route
    yield f"route       {': '.join(filter(None, (route.service and f'{route.service}, {among}', route.detail)))}"
    for place, each in enumerate(route.candidates):
        label = "endpoints" if not place else ""
        yield f"{label:<11} {each.endpoint}  {_candidate(each)}"
    if route.more:
        yield f"{'':<11} and {route.more} more"


def _admission_lines(it: AdmissionView) -> Iterator[str]:
    """What the sidecar's policy says to it, as anybody that it may come as."""
    yield f"{'service':<11} {it.service or 'none is known at this port'}, mode {it.mode}"
    for place, each in enumerate(it.callers):
        yield f"{'callers' if not place else '':<11} {each.identity or 'in plain text'}: {_admission(each)}"
    if it.more:
        yield f"{'':<11} and {it.more} more"
    reasons = dict.fromkeys(each.reason for each in it.callers if not each.allowed)
    for reason in reasons:
        yield f"{'what to do':<11} {reason}: meshnet explain {reason}"


def _admission(each: Admission) -> str:
    if each.allowed:
        return f"let in by {each.policy}"
    return f"refused, {each.reason}: {each.detail}"


def _candidate(each: Candidate) -> str:
    if each.why_not:
        return f"passed over: {each.why_not}"
    warming = f", {each.warmth:.0%} of it while it is warming" if each.warmth < 1 else ""
    parts = [
        "in plain TCP" if each.tunnel == "none" else f"by tunnel ({each.tunnel})",
        each.near and {"zone": "same zone", "region": "same region", "any": "far"}[each.near],
        f"weight {each.weight}{warming}",
        f"{each.connections} connections",
        "" if each.connect_ms is None else f"connects in {each.connect_ms:.1f} ms",
        f"score {each.score:.3g}",
    ]
    return ", ".join(filter(None, parts))


def _verdict(step: RuleStep) -> str:
    return "left alone" if step.action == "return" else f"captured ({step.action})"


def rule_words(step: RuleStep) -> str:
    """Where it stands, why it is there, and what it matches."""
    why = f" ({step.why})" if step.why else ""
    return f"rule {step.number} of {step.chain}{why}: {step.match}"


def _other(other: "Foreign") -> str:
    return f"table {other.table}, {other.chain}, priority {other.priority}: {other.text}"
