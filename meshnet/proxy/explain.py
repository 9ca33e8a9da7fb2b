"""A connection told step by step, from its record: what was decided, what happened, where it stopped."""

from meshnet.model.canary import is_canary
from meshnet.model.connection import Direction, Security
from meshnet.proxy.record import Record


def trace(record: Record) -> tuple[str, ...]:
    """One line a step, in the order they were taken."""
    steps = [f"capture: {record.direction} from {record.source} to {record.original or 'an unknown destination'}"]
    if record.direction is Direction.INBOUND:
        who = record.source_identity or "a client without identity"
        steps.append(f"identity: {who}, {'through a tunnel' if record.security is Security.MTLS else 'in plain text'}")
    if record.service:
        steps.append(f"service: {record.service}")
    elif record.original is not None and record.direction is Direction.OUTBOUND and is_canary(record.original):
        steps.append("service: none; a canary of `meshnet rules verify` or `up`, answered here and carried nowhere")
    elif record.original is not None:
        steps.append("service: none has this address; passed through" if record.endpoint else "service: none")
    if record.policy:
        steps.append(f"policy: {record.policy}")
    if record.queued is not None:
        steps.append(f"limits: waited {record.queued * 1000:.0f} ms for a free connection")
    if record.by_order:
        steps.append("order: decided before, for all connections from there to here; the relay dialled by itself")
    for number, attempt in enumerate(record.attempts, 1):
        detail = f": {attempt.detail}" if attempt.detail else ""
        steps.append(f"attempt {number}: {attempt.endpoint} {attempt.result} after {attempt.ms:g} ms{detail}")
    if record.security is Security.MTLS:
        shake = (
            f"{'resumed' if record.resumed else 'full'} handshake in {record.handshake_ms:.1f} ms"
            if record.handshake_ms is not None
            else "on a tunnel that stood already"
        )
        who = f"{record.source_identity} to {record.destination_identity}"
        steps.append(f"mtls: {who}, {record.tls_version} {record.cipher}, {shake}")
    if record.connected is not None:
        steps.append(
            f"data: {record.tally.sent} bytes sent, {record.tally.received} received, moved by {record.relay or '-'}"
        )
    if record.reason is None:
        steps.append(f"now: {record.state}")
    else:
        detail = f": {record.detail}" if record.detail else ""
        steps.append(f"end: {record.reason} by {record.ended_by} in phase {record.phase}{detail}")
    return tuple(steps)
