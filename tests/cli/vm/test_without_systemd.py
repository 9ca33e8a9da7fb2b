"""`meshnet up` with the files of a host of its own, and no systemd there: who the sidecar is then."""

import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshnet.errors import CommandError
from meshnet.model.admin import ConnectionList, GetStatus, ListConnections, Status
from meshnet_cli.client import ask
from tests.cli.machine import talk
from tests.proxy.programs import accept, listen
from tests.world import Host, Process, World, wait_for

pytestmark = pytest.mark.netns

# In a mount and a pid namespace of its own, so that accounts and files are made here and end with it.
_HOST = """
set -eu
mount -t tmpfs tmpfs "$1"
cp -a /etc "$1/etc"
mkdir "$1/lib" "$1/run"
mount --bind "$1/etc" /etc
mount --bind "$1/lib" /var/lib
mount --bind "$1/run" /run
own=$1 folder=$2 first=$3
shift 3
while [ $# -gt 0 ]; do  # what leads to Python and is closed, such as /root: the same with that one thing in it, open
    mkdir "$own/$#"
    mount --bind "$1/$2" "$own/$#"
    mount -t tmpfs -o mode=755 tmpfs "$1"
    mkdir "$1/$2"
    mount --bind "$own/$#" "$1/$2"
    shift 2
done
files() { find /etc /var/lib /run -printf '%p %u:%g %m\\n' | grep -Ev '^/etc(/(.pwd.lock|[a-z]+-))? ' | sort; }
accounts() { sort /etc/passwd /etc/group /etc/shadow /etc/gshadow; }
before=$(files; accounts)
eval "$first"
meshnet up
echo it is up
until [ -e "$folder/down" ]; do sleep 0.1; done
meshnet down --purge
after=$(files; accounts)
[ "$before" = "$after" ] || { echo "$before" >"$own/before"; echo "$after" | diff "$own/before" -; exit 1; }
echo nothing is left
"""


class Vm:
    """`first` is what is typed before `meshnet up`."""

    def __init__(self, host: Host, first: str = "") -> None:
        self.host = host
        own = host.directory / "own"
        own.mkdir()
        command = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", _HOST)
        self.process: Process = host.spawn(*command, "vm", own, host.directory, first, *closed_folders(), name="vm")

    def until(self, said: str) -> None:
        wait_for(lambda: said in self.process.output or not self.process.alive, timeout=60.0, what=said)
        assert said in self.process.output, self.process.output

    def pid(self, command: bytes) -> int:
        """The one program of this host whose command line has that in it; by a pid of the test's own namespace."""
        (found,) = (pid for pid, line in self._programs() if command in line and b"setpriv" not in line)
        return found

    def path(self, path: str) -> Path:
        """A file of this host's as the test sees it."""
        return Path(f"/proc/{self.pid(b'meshnet_cli.supervise')}/root{path}")

    def _programs(self) -> Iterator[tuple[int, bytes]]:
        here = os.fstat(self.host.namespace)
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.path.samestat((entry / "ns/net").stat(), here):
                    yield int(entry.name), (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it has ended meanwhile


def status_of(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.split() for name, _, value in (line.partition(":") for line in lines)}


def closed_folders() -> Iterator[str]:
    """Each folder that keeps other users from this Python, and what of it leads there."""
    for program in dict.fromkeys((Path(sys.executable), Path(sys.executable).resolve())):
        for folder in reversed(program.parents):
            if not folder.stat().st_mode & 1:
                yield from (str(folder), program.relative_to(folder).parts[0])


def is_ready(socket: str) -> bool:
    try:
        return ask(socket, GetStatus(), Status).ready
    except CommandError:
        return False


def test_the_sidecar_is_a_user_of_its_own_with_one_right_and_nothing_is_left(world: World, real_root: bool) -> None:
    if not real_root:  # then there is one user: tests/cli/test_up_down.py shows what is said
        return
    vm, peer = Vm(world.host("vm")), world.host("peer")
    vm.until("it is up")
    sidecar = status_of(vm.pid(b"meshnet_cli.main\0proxy"))
    made = "made group meshnet, group meshnet-proxy, user meshnet"
    assert re.search(rf"^✓ account .* {made}$", vm.process.output, re.MULTILINE)
    (user,) = re.findall(r"^meshnet:x:(\d+):15137:", vm.path("/etc/passwd").read_text(), re.MULTILINE)
    assert user != "0"
    assert sidecar["Uid"] == [user] * 4
    assert sidecar["Gid"] == ["15137"] * 4
    for name in ("CapEff", "CapPrm", "CapBnd"):
        assert int(sidecar[name][0], 16) == 1 << 12  # CAP_NET_ADMIN
    assert sidecar["NoNewPrivs"] == ["1"]

    # What root keeps there is root's: neither the log nor the authority's key can be touched.
    supervisor = vm.path("/run/meshnet/supervisor")
    assert (supervisor.stat().st_uid, supervisor.stat().st_mode & 0o777) == (0, 0o700)
    authority = vm.path("/var/lib/meshnet/ca").stat()
    assert (authority.st_uid, authority.st_mode & 0o77) == (0, 0)
    socket = str(vm.path("/run/meshnet/admin.sock"))
    with listen(peer, 8080) as server, vm.host.connect(peer.address, 8080) as client, accept(server) as app:
        assert talk(client, app)
        records = ask(socket, ListConnections(all=True), ConnectionList).items
        assert f"{peer.address}:8080" in [record.original_destination for record in records]

    first = vm.pid(b"meshnet_cli.main\0proxy")
    os.kill(first, 9)
    wait_for(lambda: is_ready(socket), what="a sidecar that was started again")
    assert status_of(vm.pid(b"meshnet_cli.main\0proxy"))["Uid"] == [user] * 4
    (vm.host.directory / "down").touch()
    vm.until("nothing is left")
    assert vm.process.popen.wait(10) == 0


def test_the_umask_of_who_types_closes_nothing_to_the_sidecars_user(world: World, real_root: bool) -> None:
    if not real_root:
        return
    vm = Vm(world.host("vm"), "umask 077; meshnet set log.level=info")
    vm.until("it is up")
    modes = {
        path: stat.S_IMODE(vm.path(path).stat().st_mode)
        for path in ("/etc/meshnet", "/etc/meshnet/meshnet.toml", "/etc/meshnet/mesh.d", "/run/meshnet")
    }
    assert [oct(mode & 0o777) for mode in modes.values()] == ["0o755", "0o644", "0o755", "0o775"]
    (vm.host.directory / "down").touch()
    vm.until("nothing is left")


def test_who_may_not_change_this_host_is_told_so_by_set_as_by_up(world: World, real_root: bool) -> None:
    if not real_root:
        return
    other = "setpriv --reuid=65534 --regid=65534 --clear-groups --bounding-set=-all -- meshnet"
    first = (
        f"install -d -m 700 /var/lib/meshnet; {other} set log.level=info || echo set: exit code $?;"
        f"{other} up || echo up: exit code $?; rmdir /var/lib/meshnet"
    )
    vm = Vm(world.host("vm"), first)
    vm.until("it is up")
    assert "fix: sudo meshnet set log.level=info\nset: exit code 5\n" in vm.process.output
    assert "fix: sudo meshnet up\nup: exit code 5\n" in vm.process.output
    (vm.host.directory / "down").touch()
    vm.until("nothing is left")


def test_a_folder_that_is_closed_to_the_sidecars_user_is_named(world: World, real_root: bool) -> None:
    if not real_root:
        return
    vm = Vm(world.host("vm"), "mkdir -m 700 /etc/meshnet")
    wait_for(lambda: not vm.process.alive, timeout=60.0, what="the end of meshnet up")
    assert "error: the sidecar's user meshnet may not read /etc/meshnet/mesh.d\n" in vm.process.output
    assert "fix: namei -l /etc/meshnet/mesh.d; chmod a+x /etc/meshnet\n" in vm.process.output
