"""What a kubelet and a container runtime do with a pod, as far as it matters here, on a host of a world.

One host is one pod. Whatever a container runs with (command, variables, user, group, capabilities, mounts, probes,
hooks) is read from the manifest, as `meshnet inject` printed it. A container gets a root directory of its own in a
mount namespace, with as much of this machine in it as its programs need and the users of init/Containerfile, and its
user and capabilities by setpriv, which makes the same system calls as a runtime. Of a runtime's seccomp profile it has
that no namespace can be made.
"""

import base64
import http.client
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.world import Host, Process, ProgramFailed, wait_for

Object = dict[str, Any]
ROOT = Path(__file__).parent.parent.parent

_IMAGE = ("/dev", "/proc", "/sys", "/usr", "/bin", "/sbin", "/lib", "/lib64")
_ETC = ("alternatives", "ld.so.cache", "nginx", "nsswitch.conf", "ssl")
USERS = "root:x:0:0:root:/:/bin/sh\nmeshnet:x:15137:15137::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n"
GROUPS = "root:x:0:\nmeshnet:x:15137:root\nnogroup:x:65534:\n"

# $1 the root directory to be, then one line a mount: ro|rw SOURCE TARGET; then `--` and the command.
_ENTER = r"""
set -eu
root=$1 && shift
mount -t tmpfs -o mode=755 root "$root"
while [ "$1" != -- ]; do
    if [ -h "$2" ]; then
        cp -P "$2" "$root$3"
    else
        if [ -d "$2" ]; then mkdir -p "$root$3"; else mkdir -p "$(dirname "$root$3")" && touch "$root$3"; fi
        mount --rbind "$2" "$root$3"
        [ "$1" = rw ] || mount -o remount,bind,ro "$root$3"
    fi
    shift 3
done
shift
[ "$readonly" = no ] || mount -o remount,bind,ro "$root"
exec chroot "$root" "$@"
"""


class Pod:
    """A pod's manifest on `host`. `objects` are ConfigMaps and Secrets of its namespace, `node` is where probes come
    from, to `address` (status.podIP).
    """

    def __init__(self, host: Host, node: Host, manifest: Object, objects: list[Object], address: str) -> None:
        self.host = host
        self.address = address
        self.node = node
        self.spec: Object = manifest["spec"]
        self.name: str = manifest["metadata"].get("name", "pod")
        self.containers = {each["name"]: each for each in self._every()}
        self.processes: dict[str, Process] = {}
        self.started: list[str] = []
        self.volumes = self.host.directory / "volumes"
        for volume in self.spec.get("volumes", ()):
            self._make_volume(volume, objects)

    def start(self) -> None:
        """Init containers one after the other, native sidecars among them as soon as they have started, then the
        others. Raises ProgramFailed when an init container fails.
        """
        for container in self.spec.get("initContainers", ()):
            if container.get("restartPolicy") == "Always":
                self.start_container(container["name"])
            else:
                self.run_to_end(container["name"])
        for container in self.spec["containers"]:
            self.start_container(container["name"])

    def run_to_end(self, name: str) -> str:
        """An init container; what it prints."""
        self.started.append(name)
        done = self.host.run(*self._entered(self.containers[name]), **self._variables(name))
        return done.stdout + done.stderr

    def start_container(self, name: str) -> Process:
        """It runs, and has started if it has a probe or a hook that says so."""
        container = self.containers[name]
        self.started.append(name)
        process = self.host.spawn(*self._entered(container), name=name, **self._variables(name))
        self.processes[name] = process
        if hook := container.get("lifecycle", {}).get("postStart"):
            self.execute(name, *hook["exec"]["command"])
        if "startupProbe" in container:
            patience = container["startupProbe"].get("failureThreshold", 3)

            def has_started() -> bool:
                if not process.alive:
                    raise ProgramFailed(self.host.name, (name,), process.popen.returncode, process.output)
                return self.probe(name, "startupProbe")

            wait_for(has_started, timeout=patience, what=f"{name} of {self.name} has started")
        return process

    def probe(self, name: str, field: str) -> bool:
        """Whether a kubelet would find the container well: it asks again after a failure, and believes the last of
        failureThreshold (3) in a row. Until a container has started it asks for as long as `start_container` waits.
        """
        failures = 1 if field == "startupProbe" else self.containers[name][field].get("failureThreshold", 3)
        return any(self._asked(name, field) for _ in range(failures))

    def _asked(self, name: str, field: str) -> bool:
        """A single question."""
        probe = self.containers[name][field]
        seconds = probe.get("timeoutSeconds", 1)
        if "exec" in probe:
            return self.execute(name, *probe["exec"]["command"], check=False) == 0
        try:
            if "tcpSocket" in probe:
                self.node.connect(self.address, probe["tcpSocket"]["port"], timeout=seconds).close()
                return True
            asked = probe["httpGet"]
            connection = http.client.HTTPConnection(self.address, asked["port"], timeout=seconds)
            connection.sock = self.node.connect(self.address, asked["port"], timeout=seconds)
            connection.request("GET", asked["path"], headers={"User-Agent": "kube-probe/1.34", "Connection": "close"})
            status = connection.getresponse().status
            connection.close()
        except (OSError, http.client.HTTPException):
            return False
        return 200 <= status < 400

    def execute(self, name: str, *command: str, check: bool = True) -> int:
        """A command in the container, as a hook or a probe of the sort `exec` runs it; its exit code."""
        return self.host.run(
            *self._entered(self.containers[name], command), check=check, **self._variables(name)
        ).returncode

    def asked_to_end(self, name: str) -> None:
        """The hook before the end, then SIGTERM."""
        if hook := self.containers[name].get("lifecycle", {}).get("preStop"):
            self.execute(name, *hook["exec"]["command"])
        self.processes[name].popen.terminate()

    def end_sidecars(self) -> list[int]:
        """What happens when the ordinary containers have ended: SIGTERM for the native sidecars, the last one first.

        Their exit codes. Raises TimeoutExpired when one outlives the grace period.
        """
        grace = self.spec.get("terminationGracePeriodSeconds", 30)
        native = [each["name"] for each in self.spec["initContainers"] if each.get("restartPolicy") == "Always"]
        return [self.processes[name].terminate(timeout=grace) for name in reversed(native)]

    def update(self, volume: str, files: Mapping[str, bytes]) -> None:
        """Other content for a ConfigMap or Secret: a new folder, and one link that is replaced (atomic_writer.go)."""
        folder = self.volumes / volume
        number = len(list(folder.glob("..2*")))
        version = folder / f"..2026_{number}"
        version.mkdir()
        for name, content in files.items():
            (version / name).write_bytes(content)
            if not (folder / name).is_symlink():
                (folder / name).symlink_to(f"..data/{name}")
        (folder / "..data_tmp").symlink_to(version.name)
        (folder / "..data_tmp").replace(folder / "..data")

    def _every(self) -> Iterator[Object]:
        yield from self.spec.get("initContainers", ())
        yield from self.spec["containers"]

    def _make_volume(self, volume: Object, objects: list[Object]) -> None:
        folder = self.volumes / volume["name"]
        folder.mkdir(parents=True)
        if "emptyDir" in volume:
            folder.chmod(0o777)
            return
        kind, name = (
            ("ConfigMap", volume["configMap"]["name"])
            if "configMap" in volume
            else ("Secret", volume["secret"]["secretName"])
        )
        (data,) = (each["data"] for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name))
        self.update(
            volume["name"],
            {key: text.encode() if kind == "ConfigMap" else base64.b64decode(text) for key, text in data.items()},
        )

    def _entered(self, container: Object, command: tuple[str, ...] = ()) -> list[str]:
        """The command line that becomes the container's process."""
        home = self.host.directory / "containers" / container["name"]
        home.mkdir(parents=True, exist_ok=True)
        (home / "passwd").write_text(USERS)
        (home / "group").write_text(GROUPS)
        (home / "root").mkdir(exist_ok=True)
        mounts: list[tuple[str, object, str]] = [("ro", home / name, f"/etc/{name}") for name in ("passwd", "group")]
        mounts += [("rw" if place == "/dev" else "ro", place, place) for place in _IMAGE if os.path.lexists(place)]
        mounts += [("ro", f"/etc/{name}", f"/etc/{name}") for name in _ETC if Path("/etc", name).exists()]
        # What this Python is, wherever it was put, and where it finds meshnet.
        mounts += [("ro", place, str(place)) for place in dict.fromkeys((sys.base_prefix, sys.prefix, str(ROOT)))]
        for mount in container.get("volumeMounts", ()):
            mounts.append(("ro" if mount.get("readOnly") else "rw", self.volumes / mount["name"], mount["mountPath"]))
        security = container.get("securityContext", {})
        lines = [str(part) for mount in mounts for part in mount]
        read_only = "yes" if security.get("readOnlyRootFilesystem") else "no"
        enter = ["env", f"readonly={read_only}", "unshare", "--mount", "sh", "-c", _ENTER, "sh", str(home / "root")]
        program = command or (*container.get("command", ()), *container.get("args", ()))
        return [*enter, *lines, "--", *_rights(security, self.spec.get("securityContext", {})), *program]

    def _variables(self, name: str) -> dict[str, str]:
        found = {}
        for each in self.containers[name].get("env", ()):
            source = each.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            found[each["name"]] = self.name if source == "metadata.name" else each["value"].replace("$$", "$")
        return found


# What a runtime leaves a container that says nothing (containerd, pkg/oci: the default capabilities).
_USUAL = ("chown", "dac_override", "fsetid", "fowner", "mknod", "net_raw", "setgid", "setuid", "setfcap", "setpcap",
          "net_bind_service", "sys_chroot", "kill", "audit_write")  # fmt: skip


# As the profiles of containerd and CRI-O for who has no CAP_SYS_ADMIN.
_SECCOMP = """
import errno, os, sys
sys.path.insert(0, sys.argv[1])
from tests.seccomp import Refusal, refuse
refuse(Refusal("unshare", {}, errno.EPERM))
os.execvp(sys.argv[2], sys.argv[2:])
"""


def _rights(security: Object, of_pod: Object) -> list[str]:
    capabilities = security.get("capabilities", {})
    kept = set() if capabilities.get("drop") == ["ALL"] else set(_USUAL)
    kept |= {name.lower() for name in capabilities.get("add", ())}
    user = security.get("runAsUser", of_pod.get("runAsUser", 0))
    group = security.get("runAsGroup", of_pod.get("runAsGroup", 0))
    assert not (security.get("runAsNonRoot") and user == 0), "a kubelet would refuse it"
    profile = security.get("seccompProfile", of_pod.get("seccompProfile", {})).get("type", "Unconfined")
    # The image's own groups of the user come with it, unless the pod says Strict.
    strict = of_pod.get("supplementalGroupsPolicy") == "Strict"
    groups = ("--groups", "15137") if user == 0 and not strict else ("--clear-groups",)
    return [
        "setpriv",
        *("--reuid", str(user), "--regid", str(group), *groups, "--pdeathsig", "KILL"),
        *("--inh-caps", "-all", "--bounding-set", ",".join(["-all", *(f"+{name}" for name in sorted(kept))])),
        *(() if security.get("allowPrivilegeEscalation", True) else ("--no-new-privs",)),
        "--",
        *((sys.executable, "-c", _SECCOMP, str(ROOT)) if profile == "RuntimeDefault" else ()),
    ]
