"""Whose a socket is: the process that has it open, as far as /proc lets us see."""

import os
import stat
from collections.abc import Collection, Iterator
from typing import NamedTuple

from meshnet.model.address import Address
from meshnet.net.sock_diag import LISTEN, host_of, tcp_sockets


class Process(NamedTuple):
    pid: int
    name: str


def socket_inodes(pid: int) -> Iterator[int]:
    """Of the sockets that a process has open; none if it has ended. Raises PermissionError for somebody else's."""
    folder = f"/proc/{pid}/fd"
    inode_of = _inode_of_ours if pid == os.getpid() else _inode_of
    try:
        numbers = os.listdir(folder)
    except FileNotFoundError:
        return
    for number in numbers:
        try:
            inode = inode_of(folder, number)
        except OSError:  # closed meanwhile
            continue
        if inode:
            yield inode


def _inode_of(folder: str, number: str) -> int:
    """Of a socket; 0 of anything else."""
    target = os.readlink(f"{folder}/{number}")
    return int(target[8:-1]) if target.startswith("socket:[") else 0


def _inode_of_ours(_: str, number: str) -> int:
    """The same of this process, in a tenth of the time."""
    status = os.fstat(int(number))
    return status.st_ino if stat.S_ISSOCK(status.st_mode) else 0


def processes_of(inodes: Collection[int]) -> dict[int, Process]:
    """By inode: of several that share a socket the first. Those that we may not look at are not there."""
    wanted, found = set(inodes) - {0}, dict[int, Process]()
    for entry in os.listdir("/proc"):
        if len(found) == len(wanted):
            break
        if not entry.isdigit():
            continue
        try:
            mine = wanted.intersection(socket_inodes(int(entry))) - found.keys()
        except OSError:
            continue
        if mine and (name := _name(int(entry))):
            found |= dict.fromkeys(mine, Process(int(entry), name))
    return found


def processes_at(ends: Collection[Address]) -> dict[Address, Process]:
    """Those that have a connection from there. Raises OSError."""
    inodes = {
        it.inode: end
        for it in (tcp_sockets() if ends else ())
        if it.state != LISTEN and (end := Address(host_of(it.local), it.local_port)) in ends
    }
    return {inodes[inode]: process for inode, process in processes_of(inodes).items()}


def _name(pid: int) -> str:
    """Empty if it has ended."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return ""
