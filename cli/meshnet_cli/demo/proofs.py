"""What the demonstration proves. Each proof does something, looks at what came of it, and returns the evidence."""

import json
import secrets
from collections import Counter
from collections.abc import Callable

from meshnet.errors import Reason
from meshnet.model.connection import Connection, Direction, Security
from meshnet_cli.demo.programs import HTTP_PORT, LINE_PORT
from meshnet_cli.demo.stage import API_ADDRESS, API_ADDRESS6, POLICY, Call, Stage
from meshnet_cli.demo.wire import Capture
from meshnet_cli.demo.world import Host, wait_for

SIZE = 100_000_000  # bytes, each way
MARKER_LINES = 50
CALLS = 60

URL = f"http://{API_ADDRESS}:{HTTP_PORT}/"


class NotHeld(Exception):
    """A proof failed: what was seen instead."""


class Before:
    """What has to begin before any host is in the mesh: connections that shall live on, and a look at a bare wire."""

    def __init__(self, stage: Stage) -> None:
        self.marker = f"marker-{secrets.token_hex(16)}"
        capture = Capture(stage.world.switch, self.marker.encode())
        with capture, Call(stage.web, stage.apis[0].address) as call:
            _send_marker(call, self.marker)
        self.seen = capture.with_marker
        self.calls = [
            Call(stage.web, stage.apis[0].address),
            Call(stage.apis[0], stage.web.address),
        ]
        if stage.world.ipv6:
            self.calls.append(Call(stage.web, stage.apis[0].address6))
        self.exchange()

    def exchange(self) -> None:
        """A line there and back on each of the old connections. Raises NotHeld when one has died."""
        for call in self.calls:
            text = secrets.token_hex(8)
            try:
                answer = call.say(text)
            except OSError as error:
                raise NotHeld(f"a connection opened before `up` died: {error}") from error
            _hold(answer == text, f"a connection opened before `up` gave {answer!r} for {text!r}")

    def close(self) -> None:
        for call in self.calls:
            call.close()


def bytes_intact(stage: Stage, before: Before) -> str:
    seen = json.loads(stage.ask(stage.web, "transfer", URL, str(SIZE)))
    for way in ("up", "down"):
        _hold(seen[way]["sent"] == seen[way]["arrived"], f"the hashes differ on the way {way}: {seen[way]}")
    _hold(seen["down"]["length"] == SIZE, f"{seen['down']['length']} of {SIZE} bytes came down")
    record = _record(stage.web, stage, lambda c: c.bytes_sent >= SIZE and c.bytes_received >= SIZE)
    _hold(record.tls.mode == Security.MTLS, f"its record says {record.tls.mode}, not mtls")
    return f"{SIZE // 1_000_000} MB up and down through two sidecars, SHA-256 equal (relay: {record.relay})"


def never_in_plain_text(stage: Stage, before: Before) -> str:
    _hold(before.seen >= MARKER_LINES, f"the capture saw a plain marker in {before.seen} frames: it proves nothing")
    with Capture(stage.world.switch, before.marker.encode()) as capture:
        for address in (API_ADDRESS, API_ADDRESS6) if stage.world.ipv6 else (API_ADDRESS,):
            with Call(stage.web, address) as call:
                _send_marker(call, before.marker)
    _hold(capture.lost == 0, f"the capture lost {capture.lost} frames: it proves nothing")
    _hold(capture.with_marker == 0, f"{capture.with_marker} of {capture.frames} frames show the marker")
    tunnel = stage.sidecar(stage.web).settings.proxy.tunnel_port
    _hold(tunnel in capture.tcp_ports, f"nothing went through the tunnel port; ports seen: {capture.tcp_ports}")
    plain = capture.tcp_ports & {HTTP_PORT, LINE_PORT}
    _hold(not plain, f"payload went to the application's port {plain} on the wire")
    return f"marker in 0 of {capture.frames} frames between the hosts (without the mesh: {before.seen})"


def identities_verified(stage: Stage, before: Before) -> str:
    with Call(stage.web, API_ADDRESS) as call:
        server = next(host for host in stage.apis if host.name == call.server)
        outbound = _record(stage.web, stage, lambda c: c.direction == Direction.OUTBOUND and c.reason is None)
        inbound = _record(server, stage, lambda c: c.direction == Direction.INBOUND and c.reason is None)
    for record in (outbound, inbound):
        _hold(record.tls.mode == Security.MTLS, f"the {record.direction} record says {record.tls.mode}, not mtls")
    web, api = stage.mesh.identity("web"), stage.mesh.identity(server.name)
    _hold(outbound.tls.peer_identity == api, f"web saw {outbound.tls.peer_identity!r}, not {api}")
    _hold(inbound.tls.peer_identity == web, f"{server.name} saw {inbound.tls.peer_identity!r}, not {web}")
    return f"web saw {api}, {server.name} saw {web} ({outbound.tls.version})"


def load_is_spread(stage: Stage, before: Before) -> str:
    counts = json.loads(stage.ask(stage.web, "names", URL, str(CALLS)))
    _hold(sum(counts.values()) == CALLS, f"{sum(counts.values())} of {CALLS} calls were answered")
    _hold(set(counts) == {host.name for host in stage.apis}, f"only these answered: {counts}")
    _hold(min(counts.values()) >= CALLS // 4, f"hardly spread: {counts}")
    return f"{CALLS} connections at once: {_counted(counts)}"


def open_connections_survive(stage: Stage, before: Before) -> str:
    before.exchange()
    stage.down()
    before.exchange()
    stage.up()
    before.exchange()
    return f"{len(before.calls)} connections from before `up`, both directions, lived through up, down and up again"


def killed_server_is_taken_out(stage: Stage, before: Before) -> str:
    victim = stage.apis[1]
    sidecar = stage.sidecar(stage.web)
    stage.servers[victim.name].kill()
    counts = Counter(_who_answers(stage) for _ in range(CALLS))
    _hold(victim.name not in counts, f"the dead server answered: {counts}")

    def state() -> str:
        return next(e.breaker for e in sidecar.endpoints("api").items if e.endpoint == f"{victim.address}:{LINE_PORT}")

    out = state()
    _hold(out != "closed", f"{CALLS} calls later its breaker is still {out}")
    stage.servers[victim.name] = stage.serve(victim)
    wait_for(lambda: _who_answers(stage) == victim.name, timeout=30.0, what=f"{victim.name} answers again")

    def is_closed() -> bool:
        if state() == "closed":
            return True
        _who_answers(stage)  # each worker has a breaker of its own, which closes with its next connection
        return False

    wait_for(is_closed, timeout=30.0, what=f"the breaker of {victim.name} closed")
    return f"{victim.name} killed: {CALLS} of {CALLS} calls answered by others, breaker {out}; back after its restart"


def denied_client_is_told_why(stage: Stage, before: Before) -> str:
    try:
        with Call(stage.cron, API_ADDRESS) as call:
            raise NotHeld(f"the denied client was let in: {call.hello!r}")
    except ConnectionResetError:
        pass
    except (OSError, TimeoutError) as error:
        raise NotHeld(f"the denied client saw {error!r}, not a reset") from error
    records = [_record(stage.cron, stage, _is_denied)]
    records += [r for host in stage.apis for r in stage.sidecar(host).connections() if _is_denied(r)]
    _hold(len(records) >= 2, "only the client's side has a record of it")
    for record in records:
        _hold(record.policy == POLICY, f"the {record.direction} record names the policy {record.policy!r}")
    inbound = records[-1]
    cron = stage.mesh.identity("cron")
    _hold(inbound.source.identity == cron, f"the record says that {inbound.source.identity!r} called")
    return f"cron got a reset; records on both sides: {Reason.AUTHZ_DENIED}, policy {POLICY}"


PROOFS = {
    "bytes intact": bytes_intact,
    "never in plain text": never_in_plain_text,
    "identities verified": identities_verified,
    "load is spread": load_is_spread,
    "open connections survive": open_connections_survive,
    "killed server taken out": killed_server_is_taken_out,
    "denied client told why": denied_client_is_told_why,
}


def _send_marker(call: Call, marker: str) -> None:
    for number in range(MARKER_LINES):
        text = f"{number} {marker}"
        answer = call.say(text)
        _hold(answer == text, f"sent {text!r}, got {answer!r}")


def _who_answers(stage: Stage) -> str:
    try:
        with Call(stage.web, API_ADDRESS) as call:
            return call.server
    except OSError as error:
        raise NotHeld(f"a call failed: {error}") from error


def _is_denied(record: Connection) -> bool:
    return record.reason is not None and record.reason.code == Reason.AUTHZ_DENIED


def _record(host: Host, stage: Stage, wanted: Callable[[Connection], bool]) -> Connection:
    """The newest such record of the sidecar on `host`, awaited for a moment."""

    def newest() -> Connection | None:
        found = [record for record in stage.sidecar(host).connections() if wanted(record)]
        return max(found, key=lambda record: record.opened_at, default=None)

    found = wait_for(newest, timeout=5.0, what=f"a record on {host.name}")
    assert found is not None
    return found


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _hold(held: bool, otherwise: str) -> None:
    if not held:
        raise NotHeld(otherwise)
