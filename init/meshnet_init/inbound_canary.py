"""A canary that comes from elsewhere: the inbound proxy answers it only if the kernel's rules capture what comes in.

As with those that go out (canary.py), we listen in the proxy's place where none runs. A host firewall may drop what
comes in by an interface that it does not know: then nothing is proved, and nothing is lost.
"""

import socket
import time

from msgspec import structs

from meshnet.model.address import Address
from meshnet.model.canary import CANARY_PORT, FAMILIES, INBOUND_CANARY, IpFamily, greeting
from meshnet.net.canary import begin_connect
from meshnet_init.backends import Backend, Installed
from meshnet_init.canary import PATIENCE, Canary, Status, finish_connect, listen, read_all, receive_own
from meshnet_init.rule import READINESS, Plan
from meshnet_init.sidecar import captured_inbound, turns_inbound
from meshnet_init.visitor import NoVisitor, a_visitor

_REFUSED = "it was refused, and no rule of ours had caught it"


def inbound_hits(installed: Installed | None) -> int:
    """How many connections the inbound redirects have caught."""
    counted = installed.rules if installed is not None else ()
    return sum(each.packets for each in counted if turns_inbound(each.rule))


def fly_in(
    plan: Plan, inbound_port: int, backend: Backend, installed: Installed | None, *, proxy_runs: bool = False
) -> tuple[Canary, ...]:
    """One canary a family, by a visitor, whose rights it takes; else they are `not tried`.

    `installed` is what `backend` has just found: if the hits of the inbound redirects have grown since then, a canary
    that was refused was captured all the same. It makes an interface for a moment, so it is not for every look.
    `proxy_runs`: then nobody may take its place.
    """
    ports = {family: _port(plan, family) for family in FAMILIES}
    left_alone = "the plan captures nothing that comes in"
    if not any(ports.values()):
        return tuple(_canary(family, "not in the plan", left_alone) for family in FAMILIES)
    found: list[Canary] = []
    transparent = any(rule.tproxy for rule in plan.rules)
    try:
        with a_visitor() as sockets:
            for family in FAMILIES:
                port, client = ports[family], sockets.get(family)
                if not port:
                    found.append(_canary(family, "not in the plan", left_alone))
                elif client is None:
                    found.append(_canary(family, "no route", "this host does without the family"))
                else:
                    target = Address(INBOUND_CANARY[family], port)
                    listener = listen(family, inbound_port, everywhere=True, transparent=transparent)
                    found.append(_fly(client, family, target, listener, inbound_port, proxy_runs))
    except NoVisitor as why:
        return tuple(_canary(family, "not tried", str(why)) for family in FAMILIES)
    if any(canary.detail == _REFUSED for canary in found):
        captured = sum(canary.status == "captured" for canary in found)
        if inbound_hits(backend.installed()) - inbound_hits(installed) > captured:
            found = [_by_a_firewall(canary) if canary.detail == _REFUSED else canary for canary in found]
    return tuple(found)


def _fly(
    client: socket.socket,
    family: IpFamily,
    target: Address,
    listener: socket.socket | None,
    inbound_port: int,
    proxy_runs: bool,
) -> Canary:
    deadline = time.monotonic() + PATIENCE
    if listener is not None and proxy_runs:
        listener.close()
        return _canary(family, "not captured", f"nobody listens on port {inbound_port}, where the rules lead", target)
    try:
        begin_connect(target, sock=client)
        if listener is not None:
            receive_own(listener, client, target, deadline)
            return _canary(family, "captured", "it came back to us", target, by_us=True)
        finish_connect(client, deadline)
        answer = read_all(client, len(greeting(target)), deadline)
    except ConnectionRefusedError:
        return _canary(family, "not captured", _REFUSED, target)
    except OSError as error:
        why = f"a firewall of this host may drop what a new interface brings ({error.strerror or error})"
        return _canary(family, "not tried", why, target)
    finally:
        if listener is not None:
            listener.close()
    if answer == greeting(target):
        return _canary(family, "captured", "the proxy answered", target)
    return _canary(family, "not captured", "whoever answered is not the inbound proxy", target)


def _by_a_firewall(canary: Canary) -> Canary:
    return structs.replace(canary, status="not tried", detail="the rules caught it, and a firewall refused it")


def _port(plan: Plan, family: IpFamily) -> int:
    """One whose connections are captured whoever calls; 0 if there is none."""
    turning = [rule for rule in plan.rules if turns_inbound(rule) and rule.ports is not None]
    turning.sort(key=lambda rule: rule.why == READINESS)  # last: it is there even where no application is captured
    ports = [CANARY_PORT, *(port for rule in turning if rule.ports for port in (rule.ports.first, rule.ports.last))]
    if family == "ipv6" and not plan.ipv6:
        return 0
    return next((port for port in ports if captured_inbound(plan.rules, port, INBOUND_CANARY[family])), 0)


def _canary(
    family: IpFamily, status: Status, detail: str, target: Address | None = None, *, by_us: bool = False
) -> Canary:
    return Canary(
        direction="inbound", family=family, status=status, destination=str(target or ""), detail=detail, by_us=by_us
    )
