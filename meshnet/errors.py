"""Why something failed. Few classes, one level deep; what a program or a person switches on is the reason code."""

import enum


class Reason(enum.StrEnum):
    """Why a connection ended: stable codes, used as they stand in records, logs, metric labels and RESET frames."""

    OK = "ok"
    NO_ENDPOINT = "no_endpoint"
    CONNECT_REFUSED = "connect.refused"
    CONNECT_TIMEOUT = "connect.timeout"
    CONNECT_UNREACHABLE = "connect.unreachable"
    TLS_HANDSHAKE = "tls.handshake"
    TLS_PEER_IDENTITY = "tls.peer_identity"
    TLS_EXPIRED = "tls.expired"
    TLS_NOT_YET_VALID = "tls.not_yet_valid"
    TLS_NO_IDENTITY = "tls.no_identity"
    TUNNEL_PROTOCOL = "tunnel.protocol"
    TUNNEL_LOST = "tunnel.lost"
    AUTHN_PLAINTEXT = "authn.plaintext"
    AUTHN_DISABLED = "authn.disabled"
    AUTHZ_DENIED = "authz.denied"
    AUTHZ_REVOKED = "authz.revoked"
    LIMIT_CONNECTIONS = "limit.connections"
    LIMIT_QUEUE_TIMEOUT = "limit.queue_timeout"
    LIMIT_HOST = "limit.host"
    BREAKER_OPEN = "breaker.open"
    ENDPOINT_EJECTED = "endpoint.ejected"
    ENDPOINT_REMOVED = "endpoint.removed"
    IDLE = "idle"
    HALF_CLOSE_TIMEOUT = "half_close_timeout"
    MAX_AGE = "max_age"
    REBALANCE = "rebalance"
    DRAIN = "drain"
    ADMIN_KILLED = "admin.killed"
    PEER_RST = "peer.rst"
    KEEPALIVE_DEAD = "keepalive.dead"
    LOOP = "loop"
    NOT_REDIRECTED = "not_redirected"
    NOT_LOCAL = "not_local"
    CONFIG_NONE = "config.none"
    INTERNAL = "internal"


class EndedBy(enum.StrEnum):
    """Who ended a connection."""

    CLIENT = "client"
    SERVER = "server"
    PROXY = "proxy"
    POLICY = "policy"
    DRAIN = "drain"
    LIMIT = "limit"
    PEER_PROXY = "peer-proxy"
    ADMIN = "admin"


class Phase(enum.StrEnum):
    """How far a connection had come."""

    ACCEPT = "accept"
    QUEUE = "queue"
    CONNECT = "connect"
    TLS = "tls"
    AUTHZ = "authz"
    DATA = "data"
    HALF_CLOSED = "half-closed"


class MeshnetError(Exception):
    """Anything meshnet raises on purpose."""


class ConnectionFailed(MeshnetError):
    """One connection cannot go on; the record keeps `reason`, `ended_by`, `policy` and the text."""

    def __init__(
        self, reason: Reason, detail: str = "", *, ended_by: EndedBy = EndedBy.PROXY, policy: str = ""
    ) -> None:
        super().__init__(detail or str(reason))
        self.reason = reason
        self.detail = detail
        self.ended_by = ended_by
        self.policy = policy


class TunnelError(MeshnetError):
    """The peer broke meshnet/1; the tunnel is of no further use."""


class ConfigError(MeshnetError):
    """A setting or resource is wrong: what, where, and what to write instead."""

    def __init__(self, problem: str, *, file: str = "", line: int = 0, suggestion: str = "") -> None:
        self.problem = problem
        self.file = file
        self.line = line
        self.suggestion = suggestion
        super().__init__(str(self))

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}: " if self.file and self.line else f"{self.file}: " if self.file else ""
        return place + self.problem + (f" ({self.suggestion})" if self.suggestion else "")


class CommandError(MeshnetError):
    """A command failed: what happened, why, what to type next, and the exit code that says so."""

    def __init__(self, what: str, *, why: str = "", fix: str = "", code: int = 1) -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.fix = fix
        self.code = code
