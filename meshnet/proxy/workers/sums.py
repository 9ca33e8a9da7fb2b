"""The metrics of several workers as those of one sidecar. Pure."""

import operator
from collections.abc import Callable, Iterable, Mapping

from msgspec import structs

from meshnet.model.admin import Family, Sample

# Counters and histograms are added up. Of each gauge this says what becomes of two workers' values.
GAUGES: Mapping[str, Callable[[float, float], float]] = {
    "meshnet_tcp_connections_open": operator.add,
    "meshnet_tunnels": operator.add,
    "meshnet_tunnel_waiting": operator.add,
    "meshnet_tunnel_arriving": operator.add,
    "meshnet_build_info": max,  # 1 each
    "meshnet_breaker_state": max,  # each has breakers of its own: the worst
    "meshnet_endpoint_weight": max,
    "meshnet_endpoint_connections": operator.add,
    "meshnet_endpoint_pending": operator.add,
    "meshnet_endpoint_failures": max,
    "meshnet_endpoint_open_for_seconds": max,
    "meshnet_endpoint_ejected_for_seconds": max,
    "meshnet_endpoint_connect_seconds": max,
    "meshnet_endpoints": max,  # of healthy ones the fewest
    "meshnet_service_panic": max,
    "meshnet_check_panic": max,
    "meshnet_dns_failing_names": max,  # each asks by itself
    "meshnet_cert_expiry_timestamp_seconds": min,
    "meshnet_config_revision": min,  # the one that is behind
    "meshnet_config_age_seconds": max,
}


def add_up(parts: Iterable[Iterable[Family]]) -> tuple[Family, ...]:
    """One family for each name, with one sample for each set of labels."""
    families: dict[str, Family] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], Sample]] = {}
    for part in parts:
        for family in part:
            families.setdefault(family.name, family)
            samples = values.setdefault(family.name, {})
            for sample in family.samples:
                key = (sample.name, tuple(sample.labels.items()))
                had = samples.get(key)
                if had is not None:
                    how = _how(family, sample)
                    sample = structs.replace(sample, value=how(had.value, sample.value))
                samples[key] = sample
    return tuple(structs.replace(family, samples=tuple(values[name].values())) for name, family in families.items())


class Totals:
    """What the processes of all workers have counted, by pid; also those that have died, as far as they were heard.

    A counter that lost what a dead worker had counted would fall, and Prometheus would take that for a new beginning
    and count everything once more.
    """

    def __init__(self) -> None:
        self._heard: dict[int, tuple[Family, ...]] = {}
        self._past: tuple[Family, ...] = ()

    def heard(self, pid: int, families: tuple[Family, ...]) -> None:
        self._heard[pid] = families

    def died(self, pid: int) -> None:
        counted = [family for family in self._heard.pop(pid, ()) if family.type != "gauge"]
        self._past = add_up((self._past, counted))

    def parts(self) -> tuple[tuple[Family, ...], ...]:
        """To be added up; they never change, so that a thread may do it."""
        return (self._past, *self._heard.values())


def _how(family: Family, sample: Sample) -> Callable[[float, float], float]:
    if family.type != "gauge":
        return operator.add
    if sample.labels.get("state") == "healthy":
        return min
    return GAUGES.get(family.name, max)
