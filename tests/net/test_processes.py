"""Whose a socket is, as /proc tells."""

import os
import socket
import subprocess
import sys

from meshnet.net.processes import Process, processes_of, socket_inodes


def test_the_process_that_has_it_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        inode = os.fstat(listener.fileno()).st_ino
        assert inode in set(socket_inodes(os.getpid()))
        with open("/proc/self/comm", encoding="utf-8") as file:
            name = file.read().strip()
        assert processes_of([inode, 0]) == {inode: Process(os.getpid(), name)}
    assert processes_of([inode]) == {}


def test_another_process_and_one_that_has_ended() -> None:
    script = (
        "import os, socket, sys; s = socket.socket(); print(os.fstat(s.fileno()).st_ino, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        inode = int(child.stdout.readline())
        assert processes_of([inode])[inode].pid == child.pid
        child.communicate()
    assert list(socket_inodes(child.pid)) == []
