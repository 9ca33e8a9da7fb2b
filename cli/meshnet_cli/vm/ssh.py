"""Which port the operator came in by: rules leave open connections alone, but the next login would be captured."""

import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click

from meshnet.errors import CommandError
from meshnet.model.canary import READINESS_PORT
from meshnet.model.settings import Settings

RISK = "lose-ssh"
_SSHD = Path("/etc/ssh")
_DEFAULT = 22
_ESTABLISHED, _LISTEN = "01", "0A"  # net/tcp_states.h


def risk_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--accept-risk. The command gets `accept_risk`, a tuple."""
    return click.option(
        "--accept-risk",
        type=click.Choice((RISK,)),
        multiple=True,
        help=f"Go on although it is dangerous. {RISK}: capture the port by which SSH reaches this host.",
    )(command)


def need_safe(settings: Settings, accepted: Collection[str], command: str) -> None:
    """Raises CommandError if these settings would capture the way in, unless that risk is accepted; ConfigError if they
    make no plan.
    """
    from meshnet_init.host import host_facts
    from meshnet_init.plan import make_plan
    from meshnet_init.sidecar import captured_from_anywhere

    rules = make_plan(settings, host_facts()).rules  # all that captures, not the settings that may not be all of it
    lost = sorted(port for port in ports() if captured_from_anywhere(rules, port))
    if not lost or RISK in accepted:
        return
    if settings.capture.readiness_port in lost:
        lost = [settings.capture.readiness_port]
        change = f"capture.readiness_port={READINESS_PORT}"
    else:
        change = f"capture.exclude_inbound_ports={','.join([*settings.capture.exclude_inbound_ports, *map(str, lost)])}"
    raise CommandError(
        f"this would capture port {lost[0]}, by which SSH reaches this host",
        why="open sessions would stay, but a new login would depend on the sidecar; nothing was changed",
        fix=f"sudo meshnet set {change}; or if you know another way in: {command} --accept-risk={RISK}",
        code=1,
    )


def ports(*, cautious: bool = False) -> frozenset[int]:
    """Of the SSH session that this process is in, and of every sshd that listens in this network namespace.

    And what sshd's own configuration names, if somebody listens there: systemd may listen for it, and a service
    without the capability SYS_PTRACE may not see whose socket it is. `cautious`: where that configuration is root's
    to read, and we are not, any port at which root listens may be sshd's.
    """
    found = list(_sockets())
    open_here = {sock.port for sock in found if sock.state == _ESTABLISHED}
    sessions = {port for port in _session_ports() if port in open_here}  # of this namespace, not of one further out
    listening = {sock.inode: sock for sock in found if sock.state == _LISTEN}
    seen = {listening[inode].port for inode in _sshd_sockets() if inode in listening}
    named = _configured(_SSHD) & {sock.port for sock in listening.values()}
    roots = {sock.port for sock in listening.values() if sock.user == 0} if cautious and _is_closed(_SSHD) else set()
    return frozenset(sessions | seen | named | roots)


def _is_closed(folder: Path) -> bool:
    try:
        (folder / "sshd_config").open().close()
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def _configured(folder: Path) -> set[int]:
    """Port and ListenAddress of sshd_config(5), and the default. Empty where nothing of it can be read.

    Its Include of other folders than the usual one is not followed.
    """
    text = "\n".join(map(_read, [folder / "sshd_config", *sorted(folder.glob("sshd_config.d/*.conf"))]))
    ports = {_DEFAULT} if text.strip() else set()
    for line in text.splitlines():
        key, word, *_ = (*line.replace("=", " ").replace('"', " ").split(), "", "")
        host, _, port = word.rpartition(":")
        if key.lower() == "listenaddress":
            word = port if host and (":" not in host or host.endswith("]")) else ""
        elif key.lower() != "port":
            continue
        if word.isascii() and word.isdecimal():
            ports.add(int(word))
    return ports


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _session_ports() -> Iterator[int]:
    """SSH_CONNECTION of this process and of those it comes from: sudo takes the variable out."""
    pid = os.getpid()
    while pid > 1:
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return
        for variable in environ:
            name, _, value = variable.partition(b"=")
            fields = value.split()
            if name == b"SSH_CONNECTION" and len(fields) == 4 and fields[3].isdigit():
                yield int(fields[3])


class _Socket(NamedTuple):
    state: str
    port: int
    user: int
    inode: str


def _sockets() -> Iterator[_Socket]:
    """The TCP sockets here, with their local port."""
    for name in ("tcp", "tcp6"):
        table = Path("/proc/thread-self/net") / name
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            fields = line.split()
            yield _Socket(fields[3], int(fields[1].rpartition(":")[2], 16), int(fields[7]), fields[9])


def _sshd_sockets() -> Iterator[str]:
    """The inodes of all sockets of programs called sshd, as far as we may look."""
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            if comm.read_text() != "sshd\n":
                continue
            for descriptor in (comm.parent / "fd").iterdir():
                target = os.readlink(descriptor)
                if target.startswith("socket:["):
                    yield target[8:-1]
        except OSError:
            continue
