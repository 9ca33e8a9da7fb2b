"""The part of a pod's shape that this room relies on. All else is for the cluster to judge."""

import re
from typing import Annotated, Any

import msgspec

from meshnet.codec.problem import Path, Problem


class _Part(msgspec.Struct, frozen=True, rename="camel"):
    """Other fields may be there."""


class _Metadata(_Part, frozen=True):
    labels: dict[str, Any] | None = None
    annotations: dict[str, Any] | None = None


class _Named(_Part, frozen=True):
    name: str


class _Header(_Part, frozen=True):
    name: str
    value: str = ""


class _Handler(_Part, frozen=True):
    """Of httpGet, tcpSocket and grpc."""

    port: int | str
    host: str | None = None
    path: str | None = None
    scheme: str | None = None
    service: str | None = None
    http_headers: list[_Header] | None = None


class _Probe(_Part, frozen=True):
    http_get: _Handler | None = None
    tcp_socket: _Handler | None = None
    grpc: _Handler | None = None
    timeout_seconds: int | None = None


class _Port(_Part, frozen=True):
    container_port: int
    name: str | None = None
    protocol: str | None = None


class _Security(_Part, frozen=True):
    run_as_group: int | None = None


class _Container(_Part, frozen=True):
    name: str
    ports: list[_Port] | None = None
    security_context: _Security | None = None
    startup_probe: _Probe | None = None
    liveness_probe: _Probe | None = None
    readiness_probe: _Probe | None = None


class _Os(_Part, frozen=True):
    name: str


class _Spec(_Part, frozen=True):
    containers: Annotated[list[_Container], msgspec.Meta(min_length=1)]
    init_containers: list[_Container] | None = None
    volumes: list[_Named] | None = None
    security_context: _Security | None = None
    os: _Os | None = None
    host_network: bool | None = None
    node_selector: dict[str, Any] | None = None
    service_account_name: str | None = None
    service_account: str | None = None
    termination_grace_period_seconds: int | None = None


class _Template(_Part, frozen=True):
    spec: _Spec
    metadata: _Metadata | None = None


class _Workload(_Part, frozen=True):
    metadata: _Metadata | None = None


def shape_problem(workload: object, template: object, path: Path) -> Problem | None:
    """The first thing that is not as it has to be; `path` leads to the template in its workload."""
    for value, kind, start in ((workload, _Workload, ()), (template, _Template, path)):
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            text, _, place = str(error).partition(" - at `$")
            steps = re.findall(r"\.([^.\[`]+)|\[(\d+)\]", place)
            return Problem((*start, *(name or int(index) for name, index in steps)), text.replace("`", ""))
    return None
