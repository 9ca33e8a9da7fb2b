"""What has to be true of a host before `meshnet up` touches it. Every finding says what, why and what to type."""

import errno
import ipaddress
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from meshnet.errors import CommandError
from meshnet.model.admin import Status
from meshnet.model.canary import READINESS_PORT
from meshnet.model.settings import IdentitySection, Settings
from meshnet_cli.client import EXIT_PERMISSION
from meshnet_cli.output import with_sudo

if TYPE_CHECKING:
    from meshnet_init.choose import Choice


@dataclass(frozen=True, slots=True)
class Listener:
    """A TCP port somebody listens on. `why_not` is empty when new connections to it will be captured."""

    port: int
    why_not: str


def check(settings: Settings, *, running: bool) -> "Choice":
    """The backend that the kernel takes the rules from. `running`: our own sidecar may hold the ports.

    Raises CommandError for the first thing that stands in the way.
    """
    from meshnet_init.choose import choose_for
    from meshnet_init.host import host_facts
    from meshnet_init.plan import make_plan

    choice = choose_for(settings, make_plan(settings, host_facts()))
    need_free_readiness_port(settings, running=running)
    if not running:
        need_free_ports(settings)
        need_free_group(settings)
    return choice


def need_free_ports(settings: Settings) -> None:
    """Raises CommandError for the first port of the sidecar's that somebody has."""
    for port in sorted(settings.listening_ports()):
        _need_free(port)


def need_free_readiness_port(settings: Settings, *, running: bool) -> None:
    """Raises CommandError if others reach somebody at capture.readiness_port. `running`: it may be our own sidecar,
    where IPv6 is not captured.
    """
    port = settings.capture.readiness_port
    tables = ("tcp",) if running and settings.capture.ipv6 in ("off", "reject") else ("tcp", "tcp6")
    if _reachable(tables).get(port):
        raise CommandError(
            f"somebody listens at port {port}, which is capture.readiness_port",
            why="what comes in for that port comes to the sidecar; and while there are no rules, what answers there is "
            "not the sidecar",
            fix=f"see who has it: ss -ltnp 'sport = :{port}'; or another port: "
            f"sudo meshnet set capture.readiness_port={READINESS_PORT if port != READINESS_PORT else port + 1}",
        )


def need_free_group(settings: Settings) -> None:
    """Raises CommandError for the first process that runs with the sidecar's group."""
    for pid, name in processes_in_group(settings.capture.gid):
        raise CommandError(
            f"process {pid} ({name}) runs with the group {settings.capture.gid}",
            why="traffic of that group is taken for the sidecar's own and passes the rules",
            fix="choose another group: sudo meshnet set capture.gid=15138",
        )


def need_right() -> None:
    """Raises CommandError where this command of meshnet's may not do its work."""
    from meshnet_init.host import may_change_rules

    if not may_change_rules():
        raise CommandError(
            "not allowed to change the kernel's rules",
            why="this needs the capability NET_ADMIN; a container has to be given it",
            fix=with_sudo(),
            code=EXIT_PERMISSION,
        )


def need_here(sidecar: Status | None) -> None:
    """Its admin socket is found from elsewhere too, its rules are not. Raises CommandError."""
    if sidecar is None or sidecar.network in (0, os.stat("/proc/thread-self/ns/net").st_ino):
        return
    raise CommandError(
        f"the sidecar of these settings (pid {sidecar.pid}) is in another network namespace than this command",
        why="its rules are there, and those of here would be changed",
        fix=f"the same there: sudo nsenter --net=/proc/{sidecar.pid}/ns/net meshnet ...; for a sidecar of here name "
        "another meshnet.toml, with another admin.socket, by --config",
    )


def need_fit(settings: Settings, sidecar: Status) -> None:
    """The rules must lead to the sidecar that runs and let it pass. Raises CommandError and ConfigError."""
    from meshnet_init.host import host_facts
    from meshnet_init.plan import make_plan
    from meshnet_init.sidecar import misfits

    need_here(sidecar)
    plan = make_plan(settings, host_facts())
    found = misfits(plan.rules, plan.routing, sidecar)
    if found:
        raise CommandError(
            f"the rules of these settings do not fit the sidecar that runs here (pid {sidecar.pid}); none was changed",
            why="; ".join(found),
            fix="start it again with these settings: sudo meshnet down && sudo meshnet up",
        )


def need_valid(settings: IdentitySection) -> None:
    """Raises CommandError for an identity with which the sidecar could do nothing."""
    from meshnet.control.authority import CA_CERTIFICATE
    from meshnet.net.python_tls import PythonTls
    from meshnet.proxy.identity import Identity

    identity = Identity(settings, PythonTls())
    identity.refresh()
    status, home, out = identity.status(), authority_home(Path(settings.certificate)), Path(settings.certificate).parent
    if (home / CA_CERTIFICATE).exists():
        fix = f"sudo meshnet ca issue --identity {status.identity or 'SPIFFE_ID'} --dir {home} --out {out}"
    else:
        fix = f"where the authority is: meshnet ca issue --identity {status.identity or 'SPIFFE_ID'} --out DIR;"
        fix += f" copy DIR/* to {out}/"
    if identity.credentials is None:
        raise CommandError(f"the identity in {out} is of no use", why=status.problem, fix=fix)
    if status.expires_in_seconds <= 0:
        raise CommandError("the certificate of this host has expired", why=f"it ended at {status.not_after}", fix=fix)
    if identity.credentials.not_before > time.time():
        clock = f"here it is {datetime.now(UTC).isoformat(timespec='seconds').replace('+00:00', 'Z')}"
        raise CommandError(
            "the certificate of this host is not valid yet",
            why=f"it begins at {status.not_before}, and {clock}",
            fix=f"set the clock: timedatectl; or {fix}",
        )


def authority_home(certificate: Path) -> Path:
    """Where this host's own authority is, if it has one."""
    return certificate.parent.parent / "ca"


def processes_in_group(gid: int) -> Iterator[tuple[int, str]]:
    """Processes of this network namespace whose effective group is `gid`: pid and name."""
    here = os.stat("/proc/thread-self/ns/net")
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if not os.path.samestat(os.stat(entry / "ns" / "net"), here):
                continue  # a sidecar in a container, say: our rules do not see it
            fields = dict(line.split(":", 1) for line in (entry / "status").read_text().splitlines() if line.count(":"))
        except OSError:
            continue  # it has ended meanwhile
        if int(fields["Gid"].split()[1]) == gid:
            yield int(entry.name), fields["Name"].strip()


def listeners(settings: Settings) -> list[Listener]:
    """Who listens here, and which of them meshnet will take connections for. Raises ConfigError."""
    from meshnet_init.host import host_facts
    from meshnet_init.plan import make_plan
    from meshnet_init.sidecar import captured_from_anywhere

    rules = make_plan(settings, host_facts()).rules
    reachable = _reachable(("tcp", "tcp6"))
    found = []
    for number in sorted(reachable.keys() - settings.own_ports()):
        if not reachable[number]:
            found.append(Listener(number, "loopback only"))
        elif not captured_from_anywhere(rules, number):
            found.append(Listener(number, "excluded"))
        else:
            found.append(Listener(number, ""))
    return found


def _reachable(tables: Iterable[str]) -> dict[int, bool]:
    """The ports that somebody listens at, by these tables of /proc/net: whether others than this host reach him."""
    reachable: dict[int, bool] = {}
    for name in tables:
        table = Path("/proc/thread-self/net") / name
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            _, local, _, state, _ = line.split(maxsplit=4)
            address, _, port = local.rpartition(":")
            if state == "0A":
                reachable[int(port, 16)] = reachable.get(int(port, 16), False) or not _is_loopback(address)
    return reachable


def _is_loopback(address: str) -> bool:
    """Of an address as /proc/net/tcp and tcp6 write it: 32 bits at a time, each as a number of this machine."""
    words = (int(address[at : at + 8], 16) for at in range(0, len(address), 8))
    found = ipaddress.ip_address(b"".join(word.to_bytes(4, sys.byteorder) for word in words))
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


def _need_free(port: int) -> None:
    for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((host, port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):  # a family that this host does not have
                continue
            raise CommandError(
                f"port {port} is taken",
                why=f"the sidecar needs it ({os.strerror(error.errno or 0)})",
                fix=f"see who has it: ss -ltnp 'sport = :{port}'",
            ) from error
