"""What a kubelet asks of a container, as the sidecar asks it in its place. Names are `CONTAINER/livez` and the like."""

from typing import Literal

import msgspec

ENDPOINTS = {"startupProbe": "startupz", "livenessProbe": "livez", "readinessProbe": "readyz"}
"""The last part of a check's name, by the field of a Kubernetes container that it stands for."""


class HttpCheck(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag="http"):
    """A GET that is answered with 200 to 399. HTTPS is not verified: a kubelet does not either."""

    port: int
    path: str = "/"
    scheme: Literal["HTTP", "HTTPS"] = "HTTP"
    headers: tuple[tuple[str, str], ...] = ()
    timeout: int = 1  # seconds


class TcpCheck(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag="tcp"):
    """A connection can be made."""

    port: int
    timeout: int = 1


class GrpcCheck(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag="grpc"):
    """grpc.health.v1.Health/Check answers SERVING."""

    port: int
    service: str = ""
    timeout: int = 1


Check = HttpCheck | TcpCheck | GrpcCheck
