"""Every metric but those of endpoints. The hot path adds integers; Prometheus's families are built at the scrape."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from meshnet import __version__
from meshnet.errors import Reason
from meshnet.model.admin import Family, Sample
from meshnet.model.connection import Direction, Security
from meshnet.model.identity import short_name
from meshnet.proxy.endpoint_metrics import endpoint_metrics
from meshnet.proxy.histogram import CONNECTS, DURATIONS, LAGS, Histogram, family
from meshnet.proxy.passed import Passed
from meshnet.proxy.record import Record
from meshnet.proxy.slices import slices

if TYPE_CHECKING:
    from meshnet.proxy.state import ProxyState

_MAX_SERIES = 2000  # per sidecar; what comes later is counted in series named "other"
_MAX_SERVICES = 500  # of which times are told apart, on either side: each is a score of series
_REPORTERS = {Direction.OUTBOUND: "source", Direction.INBOUND: "destination"}

# Istio's names for TCP telemetry, so that its dashboards can be used with a change of prefix.
_LABELS = (
    "reporter",
    "source_workload",
    "source_workload_namespace",
    "source_principal",
    "destination_service",
    "destination_workload",
    "destination_workload_namespace",
    "destination_principal",
    "connection_security_policy",
    "request_protocol",
)

Key = tuple[str, str, str, str, str]
"""reporter, source identity, service, destination identity, security"""

_SERVICE_LABELS = ("reporter", "destination_service")
_TIMES = (
    ("meshnet_tcp_connection_duration_seconds", "How long connections lasted.", "durations"),
    ("meshnet_tcp_connect_seconds", "From accept until both legs were up.", "connects"),
    ("meshnet_tcp_queue_seconds", "How long they waited for the limits, those that had to.", "queues"),
)

_OTHER: Key = ("other", "other", "other", "other", "other")


class ServiceCounts:
    """What is counted of all connections of one service, on one side, whoever calls."""

    __slots__ = ("connects", "durations", "queues", "retries", "retries_denied")

    def __init__(self) -> None:
        self.connects = Histogram(CONNECTS)
        self.durations = Histogram(DURATIONS)
        self.queues = Histogram(CONNECTS)
        self.retries = self.retries_denied = 0


class Cell:
    """The counts of one combination of labels."""

    __slots__ = ("closed", "failed", "opened", "received", "sent", "service")

    def __init__(self, service: ServiceCounts) -> None:
        self.service = service
        self.opened = self.closed = self.sent = self.received = 0
        self.failed: dict[Reason, int] = {}


_NONE = ServiceCounts()


class Metrics:
    """Observes the registry. A connection's counters are added up under the labels it has when they move."""

    def __init__(self) -> None:
        self.state: ProxyState | None = None
        self._cells: dict[Key, Cell] = {}
        self._services: dict[tuple[str, str], ServiceCounts] = {}  # by the labels of _SERVICE_LABELS
        self._handshakes = Histogram(CONNECTS)
        self._resumed = 0
        self._dropped_series = 0
        self._ordered = 0
        self._authorized: dict[tuple[str, str], int] = {}
        self.config_refused = 0
        self.ejections = 0
        self.renewals = 0
        self.lag = Histogram(LAGS)
        self.more: Callable[[], Iterable[Family]] = tuple
        """Of what does not belong to the connections of this process."""

    def ended(self, record: Record) -> None:
        cell = self._flush(record)
        cell.opened += 1
        cell.closed += 1
        if record.failed and record.reason is not None:
            cell.failed[record.reason] = cell.failed.get(record.reason, 0) + 1
        service = cell.service
        if record.ended is not None:
            service.durations.add(record.ended - record.opened)
        if record.connected is not None:
            service.connects.add(record.connected - record.opened)
        if record.queued is not None:
            service.queues.add(record.queued)
        service.retries += record.retries
        service.retries_denied += record.retry_denied
        self._ordered += record.by_order
        if record.call is not None:  # judged here, not by a peer
            verdict = (
                "deny" if record.reason in (Reason.AUTHZ_DENIED, Reason.AUTHZ_REVOKED) else "allow",
                record.policy,
            )
            self._authorized[verdict] = self._authorized.get(verdict, 0) + 1

    def passed(self, passed: Passed) -> None:
        """As `ended`, of those that ended well under an order."""
        told, count = passed.told, len(passed)
        cell = told.cell
        if cell is None:
            key = _key_of(
                told.flow.direction, told.source_identity, told.service, told.destination_identity, told.security
            )
            cell = told.cell = self._cell(self._within_bounds(key))
        cell.opened += count
        cell.closed += count
        column = passed.rows.column
        cell.sent += sum(column("sent"))
        cell.received += sum(column("received"))
        cell.service.durations.add_all(column("ended"))
        cell.service.connects.add_all(column("connected"))
        if told.call is not None:
            verdict = ("allow", told.policy)
            self._authorized[verdict] = self._authorized.get(verdict, 0) + count
        self._ordered += count

    def handshake(self, milliseconds: float, resumed: bool) -> None:
        self._handshakes.add(milliseconds / 1000)
        self._resumed += resumed

    async def scrape(self) -> bytes:
        """Everything as Prometheus reads it; a thread writes it down."""
        return await trio.to_thread.run_sync(generate_latest, _Scrape(await self._look()))

    async def families(self) -> tuple[Family, ...]:
        """The same, for somebody who adds it up."""
        return await trio.to_thread.run_sync(_as_structs, await self._look())

    async def _look(self) -> Iterator[Metric]:
        """Connections are looked at in slices; the rest is for a thread, which goes through what comes out of it."""
        if self.state:
            self.state.registry.catch_up()
        opened = {key: cell.opened for key, cell in self._cells.items()}
        open_now: dict[Key, int] = {}
        for records in slices(self.state.registry.open.values() if self.state else ()):
            for record in records:
                # Before it is connected its labels are still growing; a counter must not move from one set to another.
                # Ended since or not: `opened` is from before, and the next scrape must not find fewer.
                if record.connected is not None:
                    self._flush(record)
                    key = self._key(record)
                    open_now[key] = open_now.get(key, 0) + 1
            await trio.lowlevel.checkpoint()
        return self._families(opened, open_now)

    def _families(self, opened: dict[Key, int], open_now: dict[Key, int]) -> Iterator[Metric]:
        """In a thread: what it goes through never changes, or is copied at once."""
        yield from self._connections(opened, open_now)
        yield from self._by_service()
        text = "TLS handshakes of tunnels this side opened."
        yield family("meshnet_tls_handshake_seconds", text, (), [((), self._handshakes)])
        yield _counter("meshnet_tls_resumed", "Handshakes that resumed a session.", self._resumed)
        authorized = CounterMetricFamily("meshnet_authz", "Calls judged by access policy.", labels=["action", "policy"])
        for verdict, count in list(self._authorized.items()):
            authorized.add_metric(verdict, count)
        yield authorized
        yield _counter("meshnet_dropped_series", "How often other stood in for labels.", self._dropped_series)
        yield _counter("meshnet_ordered_connections", "Connections that a standing order covered.", self._ordered)
        if self.state is not None and self.state.held is not None:
            truthful = self.state.held.status()
            yield _counter("meshnet_held_connections", "Whose connect() waited for the endpoint.", truthful.held)
            yield _counter("meshnet_unheld_connections", "Accepted without, past the queue.", truthful.unheld)
        yield _counter("meshnet_config_nacks", "Mesh files that were refused.", self.config_refused)
        yield _counter("meshnet_ejections", "Endpoints that were ejected as outliers.", self.ejections)
        yield _counter("meshnet_cert_renewals", "Certificates taken up since start.", self.renewals)
        text = "How long each turn of the event loop took, or how late it began."
        yield family("meshnet_event_loop_lag_seconds", text, (), [((), self.lag)])
        build = GaugeMetricFamily("meshnet_build_info", "The version that runs.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        if self.state is not None:
            yield from _mesh(self.state)
        yield from map(_metric, self.more())

    def _connections(self, opened_before: dict[Key, int], open_now: dict[Key, int]) -> Iterator[Metric]:
        labels = list(_LABELS)
        opened = CounterMetricFamily("meshnet_tcp_connections_opened", "Connections accepted.", labels=labels)
        closed = CounterMetricFamily("meshnet_tcp_connections_closed", "Connections ended.", labels=labels)
        failed = CounterMetricFamily(
            "meshnet_tcp_connections_failed", "Connections that ended badly.", labels=[*labels, "response_flags"]
        )
        sent = CounterMetricFamily("meshnet_tcp_sent_bytes", "Bytes from client to endpoint.", labels=labels)
        received = CounterMetricFamily("meshnet_tcp_received_bytes", "Bytes from endpoint to client.", labels=labels)
        is_open = GaugeMetricFamily("meshnet_tcp_connections_open", "Connections open now.", labels=labels)
        for key in {**self._cells, **open_now}:
            values, cell, now_open = _label_values(key), self._cells.get(key) or Cell(_NONE), open_now.get(key, 0)
            opened.add_metric(values, opened_before.get(key, 0) + now_open)
            closed.add_metric(values, cell.closed)
            sent.add_metric(values, cell.sent)
            received.add_metric(values, cell.received)
            is_open.add_metric(values, now_open)
            for reason, count in list(cell.failed.items()):
                failed.add_metric([*values, str(reason)], count)
        yield from (opened, closed, failed, sent, received, is_open)

    def _by_service(self) -> Iterator[Metric]:
        services = list(self._services.items())
        for name, text, what in _TIMES:
            yield family(name, text, _SERVICE_LABELS, ((key, getattr(counts, what)) for key, counts in services))
        text = "Further attempts to connect, and those that the budget denied."
        retries = CounterMetricFamily("meshnet_retries", text, labels=[*_SERVICE_LABELS, "result"])
        for key, counts in services:
            retries.add_metric([*key, "made"], counts.retries)
            retries.add_metric([*key, "denied"], counts.retries_denied)
        yield retries

    def _flush(self, record: Record) -> Cell:
        """Adds what moved since the last look, so that a long connection shows before it ends."""
        cell = self._cell(self._key(record))
        record.tally.refresh()
        sent, received = record.tally.sent, record.tally.received
        cell.sent += sent - record.flushed_sent
        cell.received += received - record.flushed_received
        record.flushed_sent, record.flushed_received = sent, received
        return cell

    def _cell(self, key: Key) -> Cell:
        return self._cells.get(key) or self._cells.setdefault(key, Cell(self._service(key)))

    def _service(self, key: Key) -> ServiceCounts:
        labels = (key[0], key[2] or "unknown")
        if labels not in self._services and len(self._services) >= _MAX_SERVICES:
            self._dropped_series += 1
            labels = ("other", "other")
        return self._services.get(labels) or self._services.setdefault(labels, ServiceCounts())

    def _key(self, record: Record) -> Key:
        return self._within_bounds(
            _key_of(
                record.direction, record.source_identity, record.service, record.destination_identity, record.security
            )
        )

    def _within_bounds(self, key: Key) -> Key:
        if key not in self._cells and len(self._cells) >= _MAX_SERIES:
            self._dropped_series += 1
            return _OTHER
        return key


def _key_of(direction: Direction, source: str, service: str, destination: str, security: Security) -> Key:
    return (
        _REPORTERS[direction],
        source,
        service,
        destination,
        "mutual_tls" if security is Security.MTLS else "none",
    )


@dataclass(frozen=True, slots=True)
class _Scrape(Collector):
    families: Iterator[Metric]

    def collect(self) -> Iterator[Metric]:
        return self.families


def _as_structs(metrics: Iterator[Metric]) -> tuple[Family, ...]:
    return tuple(
        Family(
            name=metric.name,
            type=metric.type,
            help=metric.documentation,
            samples=tuple(Sample(name=each.name, labels=each.labels, value=each.value) for each in metric.samples),
        )
        for metric in metrics
    )


def exposition(families: Iterable[Family]) -> bytes:
    """As Prometheus reads them."""
    return generate_latest(_Scrape(map(_metric, families)))


def _metric(family: Family) -> Metric:
    metric = Metric(family.name, family.help, family.type)
    for sample in family.samples:
        metric.add_sample(sample.name, sample.labels, sample.value)
    return metric


def _label_values(key: Key) -> list[str]:
    reporter, source, service, destination, security = key
    return [
        reporter,
        *_workload(source),
        service or "unknown",
        *_workload(destination),
        security,
        "tcp",
    ]


def _workload(identity: str) -> tuple[str, str, str]:
    """workload, namespace and principal of `spiffe://domain/ns/NAMESPACE/sa/NAME`."""
    if not identity:
        return "unknown", "unknown", "unknown"
    parts = identity.split("/")
    namespace = parts[4] if len(parts) == 7 and parts[3] == "ns" else "unknown"
    return short_name(identity), namespace, identity


def _mesh(state: "ProxyState") -> Iterable[Metric]:
    now = time.monotonic()
    yield from endpoint_metrics(state, now)
    checks = CounterMetricFamily("meshnet_checks", "Active checks of endpoints.", labels=["result"])
    for result, count in state.checks.counts.items():
        checks.add_metric([result], count)
    yield checks
    yield _counter("meshnet_checks_answered", "Active checks that peers have asked for.", state.checks.answered)
    tunnels = GaugeMetricFamily("meshnet_tunnels", "Tunnels this side opened, or opens.", labels=["state"])
    idle, leased = state.pool.tunnels()
    under_way, waiting = state.pool.handshakes()
    for what, count in (("idle", idle), ("leased", leased), ("handshake", under_way)):
        tunnels.add_metric([what], count)
    yield tunnels
    yield _gauge("meshnet_tunnel_waiting", "Connections that wait for their turn at a handshake.", waiting)
    yield _gauge("meshnet_tunnel_arriving", "Handshakes under way that others have begun.", state.arrivals.under_way)
    if state.identity.credentials is not None:
        yield _gauge(
            "meshnet_cert_expiry_timestamp_seconds", "When our certificate ends.", state.identity.credentials.not_after
        )
    names = state.names
    lookups = CounterMetricFamily("meshnet_dns_lookups", "Names of endpoints asked for.", labels=["result"])
    lookups.add_metric(["answered"], names.answered)
    lookups.add_metric(["failed"], names.failed)
    yield lookups
    yield _gauge("meshnet_dns_failing_names", "Names that cannot be resolved; what was known stays.", names.failing())
    yield _gauge("meshnet_config_revision", "The snapshot in force.", state.snapshot.version)
    yield _gauge("meshnet_config_age_seconds", "How long it has been.", now - state.applied_at)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value=value)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)
