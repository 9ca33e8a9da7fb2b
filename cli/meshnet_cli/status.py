"""`meshnet status`: how this host's sidecar is. Exit code 0 if it is ready, 1 if not, 4 if there is none."""

from collections.abc import Iterator

import click

from meshnet.model.admin import CertificateStatus, ConfigStatus, GetStatus, Status, TruthfulStatus, WorkerStatus
from meshnet.model.capture import CaptureStatus
from meshnet_cli import lock
from meshnet_cli.client import EXIT_FAILED, admin_options, ask
from meshnet_cli.output import age, output_options, print_as, printable

_LABEL_WIDTH = 13


@click.command(
    epilog="\b\nExamples:\n  meshnet status\n  meshnet status -o json | jq .certificate.expiresInSeconds",
)
@output_options
@admin_options
def command(*, output: str, socket_path: str, timeout: float) -> None:
    """How the sidecar is: ready or why not.

    Exit code 0 if it is ready, 1 if it is not, 4 if none answers.
    """
    status = ask(socket_path, GetStatus(), Status, timeout=timeout)

    def table() -> None:
        rows = [*_rows(status)]
        if lock.is_orphaned(lock.folder_of(socket_path)):
            rows.insert(1, ("problem", lock.ORPHANED))
        for label, text in rows:
            click.echo(_painted(printable(f"{label:<{_LABEL_WIDTH}} {text}"), label))

    print_as(output, status, [status], name=lambda status: status.node, table=table)
    if not status.ready:
        click.get_current_context().exit(EXIT_FAILED)


def _rows(status: Status) -> Iterator[tuple[str, str]]:
    """One line each: a label, empty where the line before goes on, and a text."""
    state = "draining" if status.draining else "ready" if status.ready else "not ready"
    uptime = age(status.uptime_seconds)
    yield status.node, f"{state}, meshnet {status.version}, pid {status.pid}, up {uptime}"
    for because in status.not_ready_because:
        yield "not ready", because
    yield "listeners", ", ".join(f"{name} {address}" for name, address in status.listeners.items()) or "none"
    yield (
        "connections",
        f"{status.open_connections} open, {status.opened_total} opened, {status.failed_total} failed since it started",
    )
    for at, worker in enumerate(status.workers):
        yield "" if at else "workers", _worker(worker)
    if status.capture is not None:
        yield from _capture(status.capture)
    if status.truthful is not None:
        yield from _truthful(status.truthful)
    yield from _certificate(status.certificate)
    yield from _config(status.config)
    yield "relay", ", ".join(status.relay.in_use) or "none"
    for name, why in status.relay.not_in_use.items():
        yield "", f"not {name}: {why}"
    for at, tunnel in enumerate(status.tunnels):
        yield "" if at else "tunnels", f"{tunnel.peer}: {tunnel.idle} idle, {tunnel.leased} in use"
    if not status.tunnels:
        yield "tunnels", "none"


def _worker(worker: WorkerStatus) -> str:
    deaths = _count(worker.deaths, "death") if worker.deaths else ""
    if worker.problem:
        parts = [worker.problem, f"pid {worker.pid}" if worker.pid else "", deaths]
    else:
        parts = [
            f"pid {worker.pid}, {_count(worker.open_connections, 'connection')} open, up {age(worker.uptime_seconds)}",
            "" if worker.ready else "not ready",
            deaths,
        ]
    return f"{worker.number}: " + ", ".join(filter(None, parts))


def _capture(capture: CaptureStatus) -> Iterator[tuple[str, str]]:
    place = {True: "in place", False: "NOT in place", None: "not proved"}[capture.in_place]
    proofs = ", ".join(f"{proof.direction} {proof.family} {proof.result}" for proof in capture.proofs)
    yield "capture", ": ".join(filter(None, (place, proofs)))
    for visits in capture.visits:
        asked = f"inbound {visits.family}: readiness was last asked for through the rules at {visits.last}"
        if visits.late:
            yield "problem", f"{asked}, before that every {visits.every_seconds:.0f} s (meshnet rules verify)"
        else:
            yield "", asked
    past = [f"{_count(count, 'connection')} {name}" for name, count in capture.uncaptured.items() if count]
    if past:
        yield "problem", f"{' and '.join(past)} got past the sidecar: {', '.join(capture.examples)}"
    for name, why in capture.not_judged.items():
        yield "", f"what gets past it {name} is not counted: {why}"
    keeper = capture.keeper
    if keeper is None:
        yield "", "nobody keeps the rules (meshnet rules keep)"
        return
    yield (
        "",
        f"keeper: {keeper.state}, pid {keeper.pid}, {_count(keeper.repairs, 'repair')}, looked at {keeper.looked_at}",
    )
    if keeper.last_repair is not None:
        last = keeper.last_repair
        yield "", f"last repair {last.at}, after {last.by or 'somebody'}: {'; '.join(last.differences)}"
    if keeper.problem:
        yield "problem", f"keeper: {keeper.problem}"
    if keeper.unguarded:
        yield "", f"a flush of all rules lets connections pass until they are repaired: {keeper.unguarded}"


def _truthful(truthful: TruthfulStatus) -> Iterator[tuple[str, str]]:
    place = "in force" if truthful.in_force else "NOT in force"
    held = f"{truthful.held} held, {truthful.waiting} of them now, {truthful.unheld} came past it"
    yield "connect()", f"truthful: {place}, {held}"
    if truthful.problem:
        yield "problem", f"{truthful.problem}; connect() succeeds at once, and what fails then is reset"
    elif truthful.in_force and truthful.unheld and not truthful.held:
        yield "problem", "no rule holds connections: put the rules in again (sudo meshnet init, or meshnet up)"


def _certificate(certificate: CertificateStatus) -> Iterator[tuple[str, str]]:
    if not certificate.identity:
        yield "certificate", "none: this sidecar speaks to no meshed endpoint"
    elif certificate.begins_in_seconds:
        yield "certificate", f"{certificate.identity}, NOT VALID before {certificate.not_before}"
    elif certificate.expires_in_seconds > 0:
        left = age(certificate.expires_in_seconds)
        yield "certificate", f"{certificate.identity}, expires in {left} ({certificate.not_after})"
    else:
        yield "certificate", f"{certificate.identity}, EXPIRED {certificate.not_after}"
    if certificate.problem:
        yield "problem", certificate.problem


def _config(config: ConfigStatus) -> Iterator[tuple[str, str]]:
    yield (
        "config",
        f"version {config.version}, {age(config.age_seconds)} old, from {config.directory}: "
        f"{_count(config.services, 'service')}, {_count(config.policies, 'policy', 'policies')}",
    )
    if config.problem:
        for line in f"{config.problem}; the last good version stays in force".split("\n"):
            yield "problem", line


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _painted(line: str, label: str) -> str:
    return click.style(line, fg="red") if label in {"problem", "not ready"} else line
