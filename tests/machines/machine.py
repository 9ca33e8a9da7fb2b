"""One machine: systemd-nspawn boots Debian's own systemd on this kernel, in a network namespace of its own.

Its disk is an overlay over the image, so every machine is fresh, and what it changes goes with it. All machines are
joined by a bridge in one more namespace and reach nobody else.
"""

import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.machines import image

SWITCH = "meshnet-switch"
_RUN = image.CACHE / "run"
_NOBODY = ("192.168.56.1", "fd56::1")  # the ways to everywhere else, which lead nowhere
_REBOOT = 133  # systemd-nspawn's exit code when the machine wants to boot again
_PATIENCE = 90.0  # seconds to boot, or to end

# $1 name, $2 image, $3 folder, $4 wheels. In a mount namespace of its own, so that nothing of it is left afterwards.
_BOOT = f"""
set -eu
mount --make-rprivate /
[ -e /sys/fs/cgroup/cgroup.controllers ] || {{ umount -R /sys/fs/cgroup; mount -t cgroup2 cgroup2 /sys/fs/cgroup; }}
mkdir -p "/sys/fs/cgroup/meshnet-$1"
mkdir -p "$3/upper" "$3/work" "$3/root"
mount -t overlay overlay -o "lowerdir=$2,upperdir=$3/upper,workdir=$3/work" "$3/root"
while :; do
    nsenter --net="/run/netns/meshnet-$1" nft flush ruleset # a namespace outlives its machine, a kernel does not
    code=0
    (
        sh -c 'echo $PPID' >"/sys/fs/cgroup/meshnet-$1/cgroup.procs"
        exec systemd-nspawn -q -M "$1" -D "$3/root" --register=no --keep-unit --link-journal=no --console=pipe \\
            --network-namespace-path="/run/netns/meshnet-$1" --resolv-conf=off --timezone=off \\
            --capability=CAP_NET_ADMIN,CAP_NET_RAW --bind-ro="$4:{image.WHEELS}" -b
    ) || code=$?
    [ "$code" = {_REBOOT} ] || exit "$code"
done
"""


class Failed(Exception):
    """A command in a machine ended with another code than it should; `str` has what it printed."""


def make_switch() -> None:
    if not Path(f"/run/netns/{SWITCH}").exists():
        _host("ip", "netns", "add", SWITCH)
        _host("ip", "-n", SWITCH, "link", "add", "br0", "type", "bridge")
        _host("ip", "-n", SWITCH, "link", "set", "br0", "up")


def remove_switch() -> None:
    subprocess.run(["ip", "netns", "del", SWITCH], capture_output=True, check=False)


class Machine:
    def __init__(self, name: str, suite: str, address: str, address6: str, backend: str, hosts: str) -> None:
        self.name, self.suite, self.backend = name, suite, backend
        self.address, self.address6 = address, address6
        self._hosts = hosts
        self._folder = _RUN / name
        self._namespace = f"meshnet-{name}"
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._leader = 0

    def boot(self) -> None:
        """Returns once its systemd says that everything has started. Raises TimeoutError with the console's end."""
        self.destroy()
        upper = self._folder / "upper"
        (upper / "etc/systemd/network").mkdir(parents=True)
        (upper / "etc/hostname").write_text(self.name + "\n")
        (upper / "etc/hosts").write_text(f"127.0.0.1 localhost\n::1 localhost\n{self._hosts}")
        (upper / "etc/resolv.conf").write_text("# nobody answers here\n")
        gateways = "".join(f"Gateway={nobody}\n" for nobody in _NOBODY)
        (upper / "etc/systemd/network/20-mesh.network").write_text(
            f"[Match]\nName=eth1\n[Network]\n{gateways}IPv6AcceptRA=no\nAddress={self.address}/24\n"
            f"[Address]\nAddress={self.address6}/64\nDuplicateAddressDetection=none\n"
        )
        _host("ip", "netns", "add", self._namespace)
        _host("ip", "-n", self._namespace, "link", "set", "lo", "up")
        _host(
            "ip", "-n", SWITCH, "link", "add", f"to-{self.name}", "type", "veth",
            "peer", "name", "eth1", "netns", self._namespace,
        )  # fmt: skip
        _host("ip", "-n", SWITCH, "link", "set", f"to-{self.name}", "master", "br0", "up")
        self._power_on()

    def _power_on(self) -> None:
        tree, wheels = image.build(self.suite), image.wheels(self.suite)
        with (self._folder / "console.log").open("ab") as console:
            self._nspawn = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", _BOOT, "boot", self.name, tree, self._folder, wheels],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours
            )
        self._wait_until_up(before=self._leader)

    def reboot(self) -> None:
        before = self._leader
        self._enter("systemctl", "reboot", check=False)
        self._wait_until_up(before)

    def cut_power(self) -> None:
        """Nobody in the machine learns of it. Then it boots again, with the same disk."""
        self._end()
        self._power_on()

    def run(self, command: str, *, stdin: str | None = None, code: int | None = 0) -> str:
        """What the shell `command` prints, run by root in a unit of its own. Raises Failed for another exit code."""
        done = subprocess.run(self._line(command), input=stdin, capture_output=True, text=True, check=False)
        if code is not None and done.returncode != code:
            raise Failed(f"{self.name}: {command}\n  exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout + (done.stderr if code != 0 else "")

    def start(self, command: str) -> "subprocess.Popen[str]":
        """The same, while the test goes on; standard output and error are one."""
        return subprocess.Popen(
            self._line(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def push(self, archive: bytes, folder: str) -> None:
        """Unpacks a tar archive there."""
        line = self._line(f"mkdir -p {shlex.quote(folder)} && tar -C {shlex.quote(folder)} --no-same-owner -xf -")
        subprocess.run(line, input=archive, check=True)

    def destroy(self) -> None:
        """Whatever state it is in, that of an earlier run which was killed included."""
        self._end()
        subprocess.run(["ip", "netns", "del", self._namespace], capture_output=True, check=False)
        subprocess.run(["ip", "-n", SWITCH, "link", "del", f"to-{self.name}"], capture_output=True, check=False)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _end(self) -> None:
        """Everything that runs in the machine, and then the shell that booted it; nothing gets to say a word."""
        events = self._group() / "cgroup.events"
        if events.exists():
            (self._group() / "cgroup.kill").write_text("1")
            wait_for(lambda: "populated 0" in events.read_text(), f"the end of {self.name}")
        if self._nspawn is not None:
            self._nspawn.wait(10)
        # Also for the next boot: what is started right into a group that was once killed (clone3) is killed as well.
        group = self._group()
        for folder in sorted((group, *group.rglob("*")), reverse=True):
            if folder.is_dir():
                folder.rmdir()

    def _group(self) -> Path:
        """Its control group, where this host has those of version 2."""
        unified = Path("/sys/fs/cgroup/unified")
        return (unified if unified.is_dir() else unified.parent) / self._namespace

    def console(self) -> str:
        file = self._folder / "console.log"
        return file.read_text(errors="replace")[-3000:] if file.exists() else ""

    def how_to_enter(self) -> str:
        return f"sudo nsenter -t {self._leader} -a bash"

    def _wait_until_up(self, before: int) -> None:
        assert self._nspawn is not None
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline and self._nspawn.poll() is None:
            leader = self._find_leader()
            if leader and leader != before:
                self._leader = leader
                said = self._enter("systemctl", "is-system-running", check=False).stdout.strip()
                if said in (b"running", b"degraded"):
                    return
            time.sleep(0.1)  # noqa: TID251 - a machine that boots tells nobody outside
        raise TimeoutError(f"{self.name} did not boot:\n{self.console()}")

    def _find_leader(self) -> int:
        assert self._nspawn is not None
        for nspawn in _children(self._nspawn.pid):
            for pid in _children(nspawn):
                try:
                    if Path(f"/proc/{pid}/comm").read_text() == "systemd\n":
                        return pid
                except OSError:
                    continue
        return 0

    def _line(self, command: str) -> list[str]:
        return [
            "nsenter", "-t", str(self._leader), "-a", "--", "systemd-run", "-q", "--pipe", "--wait", "--collect",
            "--service-type=exec", "-E", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "-E", "HOME=/root", "-E", "LANG=C.UTF-8", "/bin/bash", "-c", command,
        ]  # fmt: skip

    def _enter(self, *command: str, check: bool = True) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(
            ["nsenter", "-t", str(self._leader), "-a", "--", *command], capture_output=True, check=check
        )


def wait_for(condition: Callable[[], bool], what: str, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(f"{what}: not within {timeout:g} s")
        time.sleep(0.1)  # noqa: TID251 - another machine's state is polled; nothing tells us


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _host(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
