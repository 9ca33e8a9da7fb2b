"""The metrics of workers, added up."""

import pytest

from meshnet.model.admin import Family, Sample
from meshnet.proxy.metrics import Metrics, exposition
from meshnet.proxy.workers.sums import GAUGES, Totals, add_up
from tests.proxy.test_state import a_state, mesh


def family(name: str, kind: str, *samples: tuple[str, float, dict[str, str]]) -> Family:
    return Family(
        name=name,
        type=kind,
        help="",
        samples=tuple(Sample(name=each, value=value, labels=labels) for each, value, labels in samples),
    )


def counter(value: float, **labels: str) -> Family:
    return family("meshnet_authz", "counter", ("meshnet_authz_total", value, labels))


def gauge(name: str, value: float, **labels: str) -> Family:
    return family(name, "gauge", (name, value, labels))


def values(families: tuple[Family, ...]) -> dict[tuple[str, ...], float]:
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


async def test_of_every_gauge_there_is_it_is_said_what_becomes_of_two_and_of_no_other() -> None:
    async with a_state(mesh(1)) as state:
        state.endpoint(state.snapshot.services[0].endpoints[0], state.snapshot.services[0])
        families = await state.metrics.families()
    assert {each.type for each in families} == {"counter", "gauge", "histogram"}
    # Its certificate's end is told by a sidecar that has one.
    gauges = {each.name for each in families if each.type == "gauge"} | {"meshnet_cert_expiry_timestamp_seconds"}
    assert gauges == GAUGES.keys()


async def test_what_goes_through_structs_reads_as_it_would_have() -> None:
    metrics = Metrics()
    metrics.handshake(3.0, resumed=True)
    assert exposition(await metrics.families()) == await metrics.scrape()


def test_counters_add_up_by_labels() -> None:
    together = add_up([[counter(2, action="allow")], [counter(3, action="allow")], [counter(1, action="deny")]])
    assert values(together) == {("meshnet_authz_total", "allow"): 5, ("meshnet_authz_total", "deny"): 1}


def test_histograms_add_up_by_buckets() -> None:
    name = "meshnet_tcp_connect_seconds"

    def histogram(low: float, high: float, seconds: float) -> Family:
        return family(
            name,
            "histogram",
            (f"{name}_bucket", low, {"le": "0.1"}),
            (f"{name}_bucket", high, {"le": "+Inf"}),
            (f"{name}_sum", seconds, {}),
        )

    (together,) = add_up([[histogram(1, 4, 0.5)], [histogram(2, 2, 0.25)]])
    assert [sample.value for sample in together.samples] == [3, 6, 0.75]


@pytest.mark.parametrize(
    ("name", "together"),
    [
        ("meshnet_tcp_connections_open", 5),
        ("meshnet_breaker_state", 3),
        ("meshnet_tunnels", 5),
        ("meshnet_cert_expiry_timestamp_seconds", 2),
        ("meshnet_config_revision", 2),
        ("meshnet_config_age_seconds", 3),
    ],
)
def test_gauges_as_makes_sense_of_each(name: str, together: float) -> None:
    assert values(add_up([[gauge(name, 2)], [gauge(name, 3)]])) == {(name,): together}


def test_an_endpoint_that_one_worker_has_ejected_is_not_healthy() -> None:
    name = "meshnet_endpoints"
    one = [gauge(name, 3, state="healthy"), gauge(name, 0, state="ejected")]
    other = [gauge(name, 2, state="healthy"), gauge(name, 1, state="ejected")]
    assert values(add_up([one, other])) == {(name, "healthy"): 2, (name, "ejected"): 1}


def test_what_a_dead_worker_had_counted_stays_and_what_it_held_does_not() -> None:
    totals = Totals()
    totals.heard(1, (counter(5), gauge("meshnet_tcp_connections_open", 4)))
    totals.heard(2, (counter(7), gauge("meshnet_tcp_connections_open", 1)))
    totals.heard(1, (counter(6), gauge("meshnet_tcp_connections_open", 3)))
    assert values(add_up(totals.parts())) == {("meshnet_authz_total",): 13, ("meshnet_tcp_connections_open",): 4}
    totals.died(1)
    totals.died(3)  # which nobody had asked
    totals.heard(4, (counter(1),))
    assert values(add_up(totals.parts())) == {("meshnet_authz_total",): 14, ("meshnet_tcp_connections_open",): 1}
