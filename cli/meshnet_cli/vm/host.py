"""What a host has for a sidecar, and what it lacks: kernel, other software's rules, clock, room. Changes nothing."""

import ctypes
import os
import re
import resource
import shutil
import subprocess
from functools import partial
from pathlib import Path

from meshnet.errors import CommandError, ConfigError
from meshnet.model.settings import Settings
from meshnet_cli.finding import Finding, unseen
from meshnet_init.host import host_facts, may_change_rules

_OLDEST_KERNEL = (5, 4)  # the oldest that Debian and Ubuntu still look after; pidfd_open, inet nat chains
_CONNTRACK = Path("/proc/sys/net/netfilter")
_FULL = 0.8  # of the connection tracking table: bursts still have to fit
_FEW_DESCRIPTORS = 65536  # a connection takes two or three
_TIME_ERROR = 5  # adjtimex(2)
_LITTLE = 64 << 20  # bytes
_LITTLE_SHARE = 0.05

# What other software calls its chains and tables, in the kernel's text; what it is to us.
_OTHERS = {
    "another mesh captures here": r"ISTIO_\w+|PROXY_INIT_\w+|CONSUL_PROXY_\w+|KUMA_\w+",
    "others translate addresses here": r"DOCKER\b|KUBE-SERVICES|CNI-\w+|LIBVIRT_\w+|NETAVARK\w*",
    "a firewall is here": r"ufw-\w+|FWDI_\w+|f2b-\w+|table inet firewalld|shorewall\w*",
}
_HARMFUL = next(iter(_OTHERS))

# What a host loads its rules from when it boots: nftables and iptables-persistent, of Debian, Red Hat and Arch.
_SAVED = (
    "nftables.conf",
    "nftables/*.nft",
    "iptables/*.rules",
    "iptables/rules.v[46]",
    "sysconfig/ip*tables",
    "sysconfig/nftables.conf",
)
_OURS = re.compile(r"\bMESHNET_(?:IN|OUT)\b")


def kernel() -> Finding:
    release = os.uname().release
    found = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
    if found >= _OLDEST_KERNEL:
        return Finding(code="kernel.version", level="ok", what=f"Linux {release}")
    oldest = ".".join(map(str, _OLDEST_KERNEL))
    return Finding(
        code="kernel.version",
        level="error",
        what=f"Linux {release} is older than {oldest}",
        why="rules for both families in one table, and what watches over `meshnet up`, need a newer one",
        fix="upgrade the system, or boot a newer kernel that is installed: uname -r; ls /boot",
    )


def foreign_rules() -> Finding:
    """Other software's rules, by the names that it gives them; ours stand beside them, and are first."""
    code = "rules.foreign"
    try:
        text = "\n".join(map(_printed, (("nft", "list", "ruleset"), ("iptables-legacy-save",))))
    except PermissionError as error:
        what = "whether other software has rules here cannot be seen"
        return unseen(code, what, str(error))
    found = {
        what: sorted(set(re.findall(names, text)))
        for what, names in _OTHERS.items()
        if re.search(names, text) is not None
    }
    if _HARMFUL in found:
        return Finding(
            code=code,
            level="error",
            what=f"{_HARMFUL}: {', '.join(found[_HARMFUL][:4])}",
            why="of two that turn connections to themselves one gets none, and which one nobody promises",
            fix="take the other one out of this host first, then: sudo meshnet up",
        )
    if found:
        listed = "; ".join(f"{what}: {', '.join(names[:4])}" for what, names in found.items())
        return Finding(code=code, level="ok", what=f"{listed}: left alone, and work on")
    return Finding(code=code, level="ok", what="no rules of other software that are known to matter")


def guard(settings: Settings) -> Finding:
    """Whether capture.strict can outlast a flush of all rules."""
    from meshnet_init.backends import Lack, need_right_to_change
    from meshnet_init.backends.scratch import tried_in_scratch
    from meshnet_init.keep.guard import unavailable
    from meshnet_init.plan import make_plan

    code = "rules.guard"
    try:
        need_right_to_change()
        lack, _ = tried_in_scratch(partial(unavailable, make_plan(settings, host_facts())), Lack)
    except CommandError as error:
        return unseen(code, error.what, error.why)
    except ConfigError as error:
        return Finding(code=code, level="warning", what="no rules can be planned", why=error.problem)
    if not lack:
        return Finding(code=code, level="ok", what="a keeper can hold them where no flush reaches them: capture.strict")
    return Finding(
        code=code,
        level="warning" if settings.capture.strict else "ok",
        what="capture.strict does not outlast a flush of all rules here",
        why=f"{lack.why}; connections pass until the keeper has put the rules in again",
        fix=f"Linux 5.12 or newer, with nftables: {lack.fix}",
    )


def saved_rules() -> Finding:
    """Rules of ours that somebody saved with all others come back at boot, and a sidecar may not (sshuttle#629)."""
    code = "rules.saved"
    files = sorted(file for pattern in _SAVED for file in Path("/etc").glob(pattern))
    try:
        saved = [file for file in files if file.is_file() and _OURS.search(file.read_text(errors="replace"))]
    except PermissionError as error:
        what = "whether meshnet's rules were saved for the next boot cannot be seen"
        return unseen(code, what, str(error))
    if not saved:
        return Finding(code=code, level="ok", what="none of them is saved for the next boot by somebody else")
    names = ", ".join(map(str, saved))
    return Finding(
        code=code,
        level="warning",
        what=f"meshnet's rules are saved in {names}",
        why="they come back at boot, as they were, whether a sidecar runs or not: what they capture is then refused",
        fix=f"take the lines with MESHNET_ out of {names}: meshnet puts its rules in itself",
    )


def disk(settings: Settings) -> Finding:
    code, state = "disk.room", Path(settings.mesh.last_good).parent
    folder = next(path for path in (state, *state.parents) if path.exists())
    usage = shutil.disk_usage(folder)
    if usage.free >= min(_LITTLE, _LITTLE_SHARE * usage.total):
        return Finding(code=code, level="ok", what=f"{usage.free >> 20} MB are free for {state}")
    return Finding(
        code=code,
        level="warning",
        what=f"only {usage.free >> 20} MB are free for {state}",
        why="certificates and the last good mesh are kept there; what runs goes on without, a restart may not",
        fix=f"df -h {folder}",
    )


def clock() -> Finding:
    # The kernel's own view, whoever sets the clock: struct timex is 208 bytes, and all zero it only asks.
    if ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(256)) != _TIME_ERROR:
        return Finding(code="clock.synchronised", level="ok", what="the clock is synchronised")
    return Finding(
        code="clock.synchronised",
        level="warning",
        what="nothing keeps this host's clock right",
        why="certificates are valid from a time to a time; an hour off, and peers refuse each other",
        fix="timedatectl set-ntp true, or install chrony",
    )


def conntrack() -> Finding:
    code = "conntrack.room"
    try:
        count, most = (int((_CONNTRACK / f"nf_conntrack_{name}").read_text()) for name in ("count", "max"))
    except (FileNotFoundError, PermissionError):
        return Finding(code=code, level="ok", what="no connection is tracked yet")
    if count < _FULL * most:
        return Finding(code=code, level="ok", what=f"{count} of {most} connections are tracked")
    return Finding(
        code=code,
        level="warning",
        what=f"{count} of {most} connections are tracked: the table is nearly full",
        why="captured connections are tracked, and what does not fit is dropped without a word",
        fix=f"sysctl -w net.netfilter.nf_conntrack_max={2 * most}",
    )


def descriptors() -> Finding:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = most == resource.RLIM_INFINITY or most >= _FEW_DESCRIPTORS
    return Finding(
        code="descriptors.limit",
        level="ok" if enough else "warning",
        what=f"a process may have {most} descriptors",
        why="" if enough else f"that is about {most // 2} connections",
        fix="" if enough else f"raise it: ulimit -Hn {_FEW_DESCRIPTORS}, or /etc/security/limits.conf",
    )


def _printed(command: tuple[str, ...]) -> str:
    """Nothing where it is not installed. Raises PermissionError where we may not look."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    if done.returncode and not may_change_rules():
        raise PermissionError(f"{command[0]}: {done.stderr.strip().partition(chr(10))[0]}")
    return done.stdout
