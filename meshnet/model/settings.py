"""One sidecar's settings: meshnet.toml, MESHNET_SECTION__KEY, flags. Times are durations as text (`5s`)."""

from typing import Literal

import msgspec


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The base of a [section]: snake_case keys, unknown keys refused."""


class ProxySection(Section, frozen=True):
    outbound_port: int = 15101
    inbound_port: int = 15106
    tunnel_port: int = 15108
    # SO_MARK on every socket the proxy opens; the rules let it pass. A bit that kube-proxy (0x4000, 0x8000), Calico
    # (upper 16), Cilium (0x0f00), Tailscale (0xff0000) and Istio (low 12) leave alone.
    mark: int = 0x1000
    local_mark: int = 0x2000  # on connections to applications in their client's name: answers come back here
    relay: Literal["auto", "native", "python"] = "auto"  # auto: the fastest that is there
    relay_threads: int = 1  # of the Python relay
    workers: int = 1  # processes that share the listeners
    zone: str = ""  # where this host is: endpoints of the same zone, then region, come first
    region: str = ""
    drain_timeout: str = "30s"


class AdminSection(Section, frozen=True):
    socket: str = "/run/meshnet/admin.sock"
    health_address: str = "0.0.0.0"  # *: all of both families
    health_port: int = 15120
    memory_mib: int = 32  # for connections that have ended, as `conns --all` and `explain` tell them; workers share it


class MeshSection(Section, frozen=True):
    directory: str = "/etc/meshnet/mesh.d"
    last_good: str = "/var/lib/meshnet/last-good.json"  # what a restart goes on with when the directory is bad
    resolv_conf: str = "/etc/resolv.conf"  # where the names of endpoints are asked for, and by which rules
    hosts_file: str = "/etc/hosts"  # where they are looked up first


class IdentitySection(Section, frozen=True):
    """PEM files; without a certificate the sidecar has no identity and speaks to no meshed endpoint."""

    certificate: str = "/var/lib/meshnet/identity/cert.pem"
    key: str = "/var/lib/meshnet/identity/key.pem"
    bundle: str = "/var/lib/meshnet/identity/bundle.pem"


class PoolSection(Section, frozen=True):
    idle_timeout: str = "5m"
    max_idle: int = 64  # idle tunnels kept per peer


class ProbesSection(Section, frozen=True):
    """The probe relay of a pod. `meshnet inject` writes it; without checks nothing listens."""

    port: int = 15121
    checks: str = ""  # JSON; see meshnet.codec.probes


class LogSection(Section, frozen=True):
    access: Literal["auto", "json", "text", "off"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"


class CaptureSection(Section, frozen=True):
    """What `meshnet init` and `meshnet up` put into the kernel. Ports are numbers or ranges (`8000-8100`)."""

    backend: Literal["auto", "nft", "iptables", "legacy"] = "auto"
    inbound_mode: Literal["redirect", "tproxy"] = "redirect"  # tproxy: without translating addresses
    original_source: bool = False  # applications see the client's address, not the proxy's
    truthful_connect: bool = False  # an application's connect() waits for the endpoint, and fails as it does
    inbound_ports: tuple[str, ...] = ("*",)
    exclude_inbound_ports: tuple[str, ...] = ("22",)  # the way in must not depend on the sidecar
    inbound_cidrs: tuple[str, ...] = ("*",)  # where it comes from
    exclude_inbound_cidrs: tuple[str, ...] = ()
    inbound_interfaces: tuple[str, ...] = ("*",)
    reroute_interfaces: tuple[str, ...] = ()  # bridges; what passes through from there goes to the outbound proxy
    outbound_ports: tuple[str, ...] = ("*",)
    exclude_outbound_ports: tuple[str, ...] = ()
    outbound_cidrs: tuple[str, ...] = ("*",)
    exclude_outbound_cidrs: tuple[str, ...] = ()
    loopback_ports: tuple[str, ...] = ()  # of this host itself, which otherwise is left alone
    outbound_uids: tuple[str, ...] = ()  # whose connections are captured; everybody's, where none are named
    outbound_gids: tuple[str, ...] = ()
    outbound_cgroups: tuple[str, ...] = ()  # paths below the root of cgroup v2
    exclude_uids: tuple[str, ...] = ()  # whose connections are left alone
    exclude_gids: tuple[str, ...] = ()
    exclude_cgroups: tuple[str, ...] = ()
    exclude_interfaces: tuple[str, ...] = ()
    gid: int = 15137  # the proxy's primary group
    proof_interval: str = "30s"  # between proofs that capture works; off: none
    inbound_proof_interval: str = "10m"  # the same of what comes in, which takes an interface for a moment; off: none
    readiness_port: int = 0  # where /readyz is answered only through the rules, which proves them; 0: nowhere
    required: bool = False  # not ready until capture is proved
    fail: Literal["closed", "open"] = "closed"  # what becomes of new connections when the sidecar dies
    ipv6: Literal["auto", "on", "off", "reject"] = "auto"  # off lets it pass beside the proxy, reject refuses it
    drop_invalid: bool = False  # what fits into no captured connection; not where routes are asymmetric
    strict: bool = False  # what should have been redirected and was not is refused
    quic: Literal["allow", "count", "reject"] = "allow"  # UDP 443, which passes beside the proxy
    udp: Literal["allow", "count", "reject"] = "allow"  # all other UDP
    exclude_udp_ports: tuple[str, ...] = ("53", "67-68", "123", "546-547")  # which udp = "reject" leaves alone


class Settings(Section, frozen=True):
    proxy: ProxySection = ProxySection()
    admin: AdminSection = AdminSection()
    mesh: MeshSection = MeshSection()
    identity: IdentitySection = IdentitySection()
    pool: PoolSection = PoolSection()
    log: LogSection = LogSection()
    probes: ProbesSection = ProbesSection()
    capture: CaptureSection = CaptureSection()

    def refusal_marks(self) -> tuple[int, int]:
        """What marks a held SYN that is to be answered by a reset, and by an ICMP error: beside the bits of proxy.mark
        one that is in no mark of the proxy's own. Raises ValueError where there are not two such bits.
        """
        own = self.proxy.mark | self.proxy.local_mark
        reset, unreachable, *_ = (self.proxy.mark | 1 << bit for bit in range(32) if not own >> bit & 1)
        return reset, unreachable

    def listening_ports(self) -> frozenset[int]:
        """The ports that the sidecar takes connections at: never captured."""
        proxy = self.proxy
        own = {proxy.outbound_port, proxy.inbound_port, proxy.tunnel_port, self.admin.health_port}
        return frozenset(own | {self.probes.port} if self.probes.checks else own)

    def own_ports(self) -> frozenset[int]:
        """Those, and the one that it is asked for readiness at: no application's, never dialled on a local address."""
        asked = self.capture.readiness_port
        return self.listening_ports() | {asked} if asked else self.listening_ports()
