"""A container's probes: which a kubelet would make through the rules, turned to the sidecar's relay. Pure.

`exec` runs in the container and stays as it is; so does a probe of another host, which never comes to this pod's rules.
"""

import re
from collections.abc import Iterator
from urllib.parse import quote

from meshnet.codec.probes import read_checks, write_checks
from meshnet.codec.problem import Path, Problem, quoted
from meshnet.model.probe import ENDPOINTS, Check, GrpcCheck, HttpCheck, TcpCheck
from meshnet_cli.kubernetes.containers import PROBES_PORT
from meshnet_cli.kubernetes.manifests import Object

_HANDLERS = ("httpGet", "tcpSocket", "grpc")
_UNESCAPED = "/?&=%:;,@!$'()*+~[]"  # what a path may have that is no letter, digit, `-`, `.` or `_`

Turned = dict[str, tuple[Check, Object]]
"""By the check's name, `CONTAINER/livez`: what the relay asks, and the handler that it stands for."""


def turned(container: Object, path: Path) -> tuple[Object, Turned, list[Problem]]:
    """The container with its probes asking the relay, and what they asked before. `path` leads to the container."""
    found: Turned = {}
    problems: list[Problem] = []
    changed = dict(container)
    for field, endpoint in ENDPOINTS.items():
        probe = container.get(field)
        handler = next(
            (each for each in _HANDLERS if isinstance(probe, dict) and isinstance(probe.get(each), dict)), ""
        )
        if not isinstance(probe, dict) or not handler or probe[handler].get("host"):
            continue
        name = f"{container['name']}/{endpoint}"
        check = _check(container, probe, handler, (*path, field, handler))
        if isinstance(check, Problem):
            problems.append(check)
            continue
        found[name] = (check, {handler: probe[handler]})
        relay = {"path": f"/{name}", "port": PROBES_PORT}
        changed[field] = {("httpGet" if key == handler else key): value for key, value in probe.items()} | {
            "httpGet": relay
        }
    return changed, found, problems


def turned_back(container: Object, handlers: dict[str, Object]) -> Object:
    """The container as it was; `handlers` by the names of their checks. A probe that was changed since stays."""
    changed = dict(container)
    for field, endpoint in ENDPOINTS.items():
        name = f"{container.get('name')}/{endpoint}"
        probe = container.get(field)
        relay = {"path": f"/{name}", "port": PROBES_PORT}
        if name in handlers and isinstance(probe, dict) and probe.get("httpGet") == relay:
            ((kind, handler),) = handlers[name].items()
            changed[field] = {(kind if key == "httpGet" else key): value for key, value in probe.items()} | {
                kind: handler
            }
    return changed


def _check(container: Object, probe: Object, handler: str, path: Path) -> Check | Problem:
    asked = probe[handler]
    port = _port(container, asked.get("port"))
    if port is None:
        named = ", ".join(sorted(name for name, _ in _named_ports(container)))
        hint = f"its ports: {named}" if named else "name one among its ports, or write its number"
        return Problem((*path, "port"), f"{quoted(str(asked.get('port')))} is no port of this container", hint)
    timeout = probe.get("timeoutSeconds") or 1
    check: Check
    if handler == "tcpSocket":
        check = TcpCheck(port=port, timeout=timeout)
    elif handler == "grpc":
        check = GrpcCheck(port=port, service=asked.get("service") or "", timeout=timeout)
    else:
        check = HttpCheck(
            port=port,
            path=_path(str(asked.get("path") or "/")),
            scheme="HTTPS" if str(asked.get("scheme") or "").upper() == "HTTPS" else "HTTP",
            headers=tuple((str(each["name"]), str(each.get("value", ""))) for each in asked.get("httpHeaders") or ()),
            timeout=timeout,
        )
    try:
        # What the sidecar would refuse when it starts is better refused here.
        read_checks(write_checks({f"{container['name']}/livez": check}))
    except ValueError as error:
        return Problem(path, str(error).partition(": ")[2])
    return check


def _path(text: str) -> str:
    """As a kubelet asks for it: net/url takes what is behind # away, and escapes what may not stand there."""
    return "/" + quote(text.partition("#")[0], safe=_UNESCAPED).removeprefix("/")


def _port(container: Object, port: object) -> int | None:
    """A number, a name of the container's ports, or a number as text: in that order (kubernetes, pkg/probe/util.go)."""
    if isinstance(port, int) and not isinstance(port, bool):
        return port if 1 <= port <= 65535 else None
    if not isinstance(port, str):
        return None
    number = dict(_named_ports(container)).get(port)
    if number is None and re.fullmatch("[0-9]{1,5}", port) and 1 <= int(port) <= 65535:
        return int(port)
    return number


def _named_ports(container: Object) -> Iterator[tuple[str, int]]:
    for each in container.get("ports") or ():
        if isinstance(each, dict) and isinstance(each.get("name"), str) and isinstance(each.get("containerPort"), int):
            yield each["name"], each["containerPort"]
