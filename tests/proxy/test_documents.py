"""docs/metrics.md tells of every metric and of every field of a record, and of none that is not there."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from meshnet.model.admin import EndpointView, Family, FamilyList, GetMetrics
from meshnet.model.connection import Attempt, Connection, Peer, ReasonView, TlsView, Weighed
from meshnet_cli.client import ask
from meshnet_cli.endpoints import COLUMNS
from tests.proxy.conftest import API, Hosts
from tests.proxy.programs import Records, accept, converse, is_reset, listen
from tests.proxy.workers.test_merge import VIEW

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/metrics.md").read_text()
CONNECTION_LABELS = frozenset(re.findall(r"`(\w+)`", PAGE.partition("Metrics of connections")[2].partition("below")[0]))

# Those that a sidecar on one host without keeper, workers and truthful connect has not.
_ELSEWHERE = frozenset(
    {
        "meshnet_held_connections_total",
        "meshnet_unheld_connections_total",
        "meshnet_rules_repairs_total",
        "meshnet_workers",
        "meshnet_worker_deaths_total",
    }
)


def rows(title: str) -> list[list[str]]:
    """The cells of the table below it."""
    part = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


METRICS = {name.strip("`"): (kind, labels) for name, kind, labels, _ in rows("Metrics")}
FIELDS = {name.strip("`"): metric for name, metric, _ in rows("Records")}


ENDPOINTS = {column.strip("`"): (field.strip("`"), metric) for column, field, metric, _ in rows("Endpoints")}


def full_name(family: Family) -> str:
    return family.name + "_total" if family.type == "counter" else family.name


def test_every_metric_that_the_code_names_has_a_row_and_no_other() -> None:
    text = "".join(file.read_text() for file in sorted((ROOT / "meshnet/proxy").rglob("*.py")))
    named = set(re.findall(r'"(meshnet_\w+)"', text))
    assert {name.removesuffix("_total") for name in METRICS} == {name.removesuffix("_total") for name in named}


def test_every_field_of_a_record_has_a_row_and_no_other() -> None:
    fields = msgspec.structs.fields(Connection)
    assert list(FIELDS) == [field.encode_name for field in fields]


@pytest.mark.parametrize("kind", [Attempt, Peer, ReasonView, TlsView, Weighed])
def test_the_parts_of_a_record_are_told(kind: type[msgspec.Struct]) -> None:
    records = PAGE.partition("\n## Records\n")[2]
    assert {field.encode_name for field in msgspec.structs.fields(kind)} <= set(re.findall(r"`(\w+)`", records))


@pytest.mark.parametrize("field", msgspec.structs.fields(Connection), ids=lambda field: field.encode_name)
def test_what_a_record_counts_or_times_is_a_metric_too(field: msgspec.structs.FieldInfo) -> None:
    """But for what is of one moment, or names a thing."""
    if field.type in (int, float, bool, float | None) and field.encode_name != "idleMs":
        assert FIELDS[field.encode_name].strip("`") in METRICS


def test_a_metric_is_named_by_no_record_that_is_not_there() -> None:
    assert {name for metric in FIELDS.values() for name in re.findall(r"meshnet_\w+", metric)} <= METRICS.keys()


def test_every_column_of_endpoints_has_a_row_and_no_other() -> None:
    assert list(ENDPOINTS) == list(COLUMNS)


def test_every_field_of_an_endpoint_is_told() -> None:
    part = PAGE.partition("\n## Endpoints\n")[2].partition("\n## ")[0]
    breaker = {"breaker"}  # a part of the state
    assert {field.encode_name for field in msgspec.structs.fields(EndpointView)} - breaker <= set(
        re.findall(r"`(\w+)`", part)
    )


OTHERS: dict[Any, Any] = {str: "x", int: 7, float: 7.0, float | None: 7.0}
"""A value of each type that no field of it has."""


@pytest.mark.parametrize("column", COLUMNS)
def test_a_column_shows_the_field_beside_it_and_a_figure_is_a_metric_too(column: str) -> None:
    """But for WORKERS, which says how many tell the same."""
    name, metric = ENDPOINTS[column]
    (field,) = (each for each in msgspec.structs.fields(EndpointView) if each.encode_name == name)
    change = {"breaker": "open"} if name == "state" else {field.name: OTHERS[field.type]}
    assert COLUMNS[column](msgspec.structs.replace(VIEW, **change)) != COLUMNS[column](VIEW)
    assert set(re.findall(r"meshnet_\w+", metric)) <= METRICS.keys()
    if field.type is not str and name != "workers":
        assert METRICS[metric.strip("`")] == ("gauge", "`service`, `endpoint`")


@pytest.mark.netns
def test_a_sidecar_has_them_with_the_labels_that_are_told(hosts: Hosts) -> None:
    web = hosts.sidecar(hosts.web)
    out = Records(web)
    with listen(hosts.api, 8080) as server:
        converse(hosts.web.connect(API, 8080), accept(server))
    assert is_reset(hosts.web, API, 8080)
    out.ended(2)
    families = {full_name(each): each for each in ask(web.settings.admin.socket, GetMetrics(), FamilyList).items}
    assert METRICS.keys() - families.keys() <= _ELSEWHERE
    assert families.keys() - METRICS.keys() == set()
    for name, family in families.items():
        kind, text = METRICS[name]
        labels = set(re.findall(r"`(\w+)`", text)) | (CONNECTION_LABELS if "connection labels" in text else set())
        assert family.type == kind, name
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} == labels, sample.name
