"""What one policy says: a TrafficPolicy over the defaults, an AccessPolicy with its rules checked."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec

from meshnet.codec.fields import Fields
from meshnet.codec.problem import Path
from meshnet.model.duration import format_duration
from meshnet.model.resource import AccessPolicySpec, CheckSpec, TrafficPolicySpec
from meshnet.model.service import (
    AccessPolicy,
    Balance,
    BreakerSettings,
    CheckSettings,
    ConnectSettings,
    HashOn,
    Limits,
    LocalitySettings,
    OnEject,
    Outlier,
    Rebalance,
    Rule,
    SlowStart,
    Source,
    Target,
    Timeouts,
    Traffic,
)

_SHORTEST_CHECK = 0.1  # seconds from one to the next
_LONGEST_CHECK = 10.0  # seconds that one may take: what a peer does for us, too

S = TypeVar("S", bound=msgspec.Struct)
V = TypeVar("V")


def traffic(spec: TrafficPolicySpec, fields: Fields) -> Traffic:
    """The defaults, with what the policy says in their place."""

    limits = _merged(
        Limits(),
        spec.limits,
        ("spec", "limits"),
        {
            "max_connections": fields.count,
            "max_pending": fields.count,
            "queue_timeout": fields.wait,
            "max_connections_per_endpoint": fields.count,
        },
    )
    breaker = _merged(
        BreakerSettings(),
        spec.breaker,
        ("spec", "breaker"),
        {
            "failures": fields.some,
            "open_time": fields.duration,
            "max_open_time": fields.duration,
            "jitter": fields.share,
            "reset_after": fields.wait,
        },
    )
    _in_order(("spec", "breaker"), "openTime", breaker.open_time, breaker.max_open_time, fields)
    connect = _merged(
        ConnectSettings(),
        spec.connect,
        ("spec", "connect"),
        {"attempt_timeout": fields.duration, "total_timeout": fields.duration, "attempts": fields.some},
    )
    slow_start = _merged(
        SlowStart(),
        spec.slow_start,
        ("spec", "slowStart"),
        {"window": fields.wait, "least": partial(fields.fraction, least=0.01)},
    )
    locality = _merged(
        LocalitySettings(),
        spec.locality,
        ("spec", "locality"),
        {"overprovisioning": partial(fields.fraction, least=1.0, most=100.0), "strict": _as_it_is},
    )
    rebalance = _merged(
        Rebalance(),
        spec.rebalance,
        ("spec", "rebalance"),
        {"above": partial(fields.fraction, most=1000.0), "per_minute": fields.some},
    )
    if 0 < rebalance.above <= 1:
        fields.wrong(("spec", "rebalance", "above"), "everybody has more than that", "write 1.5, or 0 for never")
    return Traffic(
        balance=spec.balance or Balance.LEAST_CONN,
        hash_on=spec.hash_on or HashOn.ADDRESS,
        slow_start=slow_start,
        locality=locality,
        limits=limits,
        breaker=breaker,
        outlier=_outlier(spec, fields),
        on_eject=spec.on_eject or OnEject.KEEP,
        connect=connect,
        timeouts=_merged(
            Timeouts(),
            spec.timeouts,
            ("spec", "timeouts"),
            dict.fromkeys(("idle", "half_closed", "max_age", "max_age_grace", "removed"), fields.wait),
        ),
        rebalance=rebalance,
        check=None if spec.check is None else _check(spec.check, fields),
    )


def _outlier(spec: TrafficPolicySpec, fields: Fields) -> Outlier:
    outlier = _merged(
        Outlier(),
        spec.outlier,
        ("spec", "outlier"),
        {
            "failure_share": fields.share,
            "min_connects": fields.some,
            "min_endpoints": partial(fields.number, least=2),
            "window": fields.duration,
            "interval": fields.duration,
            "ejection_time": fields.duration,
            "max_ejection_time": fields.duration,
            "jitter": fields.share,
            "max_ejected_share": fields.share,
        },
    )
    _in_order(("spec", "outlier"), "ejectionTime", outlier.ejection_time, outlier.max_ejection_time, fields)
    return outlier


def _in_order(at: Path, name: str, first: float, longest: float, fields: Fields) -> None:
    """A time that is doubled each time, and how long it may get."""
    if longest < first:
        limit = f"max{name[0].upper()}{name[1:]}"
        fields.wrong((*at, name), f"longer than {limit}, {format_duration(longest)}", f"raise {limit} too")


def _as_it_is(_: Path, value: object) -> object:
    return value


def _check(spec: CheckSpec, fields: Fields) -> CheckSettings:
    at: Path = ("spec", "check")
    check = _merged(
        CheckSettings(),
        spec,
        at,
        {
            "interval": fields.duration,
            "timeout": fields.duration,
            "rise": fields.some,
            "fall": fields.some,
            "send": fields.words,
            "expect": fields.words,
        },
    )
    if check.interval < _SHORTEST_CHECK:
        fields.wrong((*at, "interval"), "shorter than 100ms")
    if check.timeout > _LONGEST_CHECK:
        fields.wrong((*at, "timeout"), "longer than 10s")
    return check


def _merged(default: S, spec: msgspec.Struct, at: Path, checks: Mapping[str, Callable[[Path, Any], object]]) -> S:
    """`default` with every field that `spec` gives, each through its check."""
    given = {
        field.name: checks[field.name]((*at, field.encode_name), value)
        for field in msgspec.structs.fields(type(spec))
        if (value := getattr(spec, field.name)) is not None
    }
    return msgspec.structs.replace(default, **given)


def access_policy(name: str, spec: AccessPolicySpec, services: Sequence[str], fields: Fields) -> AccessPolicy:
    """`services` are those that `spec` names, as `namespace/name`."""
    rules = tuple(_rule(rule, ("spec", "rules", index), fields) for index, rule in enumerate(spec.rules))
    return AccessPolicy(name=name, action=spec.action, services=tuple(services), rules=rules)


def _rule(rule: Rule, at: Path, fields: Fields) -> Rule:
    """The rule with its networks in canonical text."""
    if rule.source is msgspec.UNSET and rule.target is msgspec.UNSET:
        fields.wrong(at, "an empty rule matches nobody", "say from or to")
    source, target = rule.source, rule.target
    if isinstance(source, Source):
        _not_empty(source, (*at, "from"), fields, "name principals or ipBlocks")
        source = Source(
            principals=_each(source.principals, (*at, "from", "principals"), fields.principal),
            not_principals=_each(source.not_principals, (*at, "from", "notPrincipals"), fields.principal),
            ip_blocks=_each(source.ip_blocks, (*at, "from", "ipBlocks"), fields.network),
            not_ip_blocks=_each(source.not_ip_blocks, (*at, "from", "notIpBlocks"), fields.network),
        )
    if isinstance(target, Target):
        _not_empty(target, (*at, "to"), fields, "name ports")
        target = Target(
            ports=_each(target.ports, (*at, "to", "ports"), fields.port),
            not_ports=_each(target.not_ports, (*at, "to", "notPorts"), fields.port),
        )
    return Rule(source=source, target=target)


def _each(values: tuple[V, ...], at: Path, check: Callable[[Path, V], V]) -> tuple[V, ...]:
    return tuple(check((*at, index), value) for index, value in enumerate(values))


def _not_empty(part: Source | Target, at: Path, fields: Fields, hint: str) -> None:
    if part == type(part)():
        fields.wrong(at, "it says nothing", hint)
