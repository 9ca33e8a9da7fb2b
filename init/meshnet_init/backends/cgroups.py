"""Cgroups by the number the kernel's rules know them by: that of their directory (cgroup_id of linux/cgroup.h).

Who is in one is decided when a socket is made, and a cgroup made anew under the same path is another one.
"""

import os
from pathlib import Path

from msgspec import structs

from meshnet.errors import CommandError
from meshnet_init.rule import Plan

_MOUNTS = Path("/proc/thread-self/mountinfo")


def without_missing(plan: Plan) -> Plan:
    """Nobody is in a cgroup that is not there, and the kernel refuses to match it."""
    gone = missing(plan)
    return structs.replace(plan, rules=tuple(rule for rule in plan.rules if rule.cgroup not in gone)) if gone else plan


def missing(plan: Plan) -> tuple[str, ...]:
    """The cgroups it names that are not there."""
    named = sorted({rule.cgroup for rule in plan.rules} - {""})
    mount = root() if named else None
    return tuple(path for path in named if mount is None or not (mount / path).is_dir())


def cgroup_id(path: str) -> int:
    """Raises CommandError where there is no such cgroup."""
    mount = root()
    try:
        if mount is None:
            raise FileNotFoundError
        return (mount / path).stat().st_ino
    except OSError:
        raise CommandError(
            f"there is no cgroup {path}",
            why="cgroup v2 is not mounted here" if mount is None else f"{mount / path} is not there",
            fix="see which there are: systemd-cgls; or leave it out: capture.exclude_cgroups, capture.outbound_cgroups",
        ) from None


def cgroup_path(number: int) -> str:
    """A question mark and the number where it is no cgroup's any more."""
    mount = root()
    for folder, _, _ in os.walk(mount) if mount is not None else ():
        if os.stat(folder).st_ino == number:
            return os.path.relpath(folder, mount)
    return f"?{number}"


def root() -> Path | None:
    """Where cgroup v2 is mounted, if it is."""
    for line in _MOUNTS.read_text().splitlines():
        mount, _, filesystem = line.partition(" - ")
        if filesystem.split()[0] == "cgroup2":
            return Path(mount.split()[4])
    return None
