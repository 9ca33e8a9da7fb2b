"""What is done to a machine, and what has to be so afterwards. Each raises Failed where it is not."""

import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.machines import image, state, traffic
from tests.machines.machine import Failed, Machine, wait_for

# Of `meshnet up`, that change something.
PHASES = ("account", "identity", "proxy", "rules", "verify")
_PROOFS = [(direction, family) for direction in ("outbound", "inbound") for family in ("ipv4", "ipv6")]

_NOT_SHIPPED = {".git", ".venv", "build", "dist", "__pycache__"}

_SERVICE = """
apiVersion: meshnet.dev/v1
kind: Service
metadata: {{name: {name}-{port}}}
spec:
  addresses: [10.96.{number}.{port_low}]
  ports: [{{port: {port}, mode: permissive}}]
  endpoints:
    - {{address: {address}, tunnel: meshnet, identity: "spiffe://machines/ns/default/sa/{name}"}}
    - {{address: "{address6}", tunnel: meshnet, identity: "spiffe://machines/ns/default/sa/{name}"}}
"""


def provision(machine: Machine) -> None:
    machine.push(checkout(), "/vagrant")
    machine.run("sh /vagrant/vagrant/provision.sh")


def issue_identities(home: Machine, other: Machine) -> None:
    home.run("meshnet ca init --trust-domain machines")
    home.run(f"meshnet ca issue --service {home.name}")
    home.run(f"meshnet ca issue --service {other.name} --out /root/identity")
    archive = subprocess.run(
        home._line("tar -C /root/identity -c . && rm -r /root/identity"), capture_output=True, check=True
    )
    other.push(archive.stdout, "/var/lib/meshnet/identity")


def write_mesh(machines: Iterable[Machine]) -> None:
    """Each of them is behind services of its own: one for each port that is talked to."""
    machines = tuple(machines)
    text = "---".join(
        _SERVICE.format(
            name=machine.name,
            number=number,
            port=port,
            port_low=low,
            address=machine.address,
            address6=machine.address6,
        )
        for number, machine in enumerate(machines)
        for low, port in enumerate(traffic.PORTS.values(), 1)
    )
    for machine in machines:
        machine.run("mkdir -p /etc/meshnet/mesh.d && cat >/etc/meshnet/mesh.d/machines.yaml", stdin=text)


def choose_backend(machine: Machine) -> None:
    """In a file of the administrator's own, which no purge takes away. Without one it is nft."""
    if machine.backend == "iptables":
        machine.run("DEBIAN_FRONTEND=noninteractive apt-get install -y -qq iptables")
        said = f'[capture]\nbackend = "{machine.backend}"\n'
        machine.run("mkdir -p /etc/meshnet && cat >/etc/meshnet/meshnet.toml", stdin=said)


def up(machine: Machine) -> None:
    said = machine.run("meshnet up")
    phases = re.findall(r"^✓ (\w+) +[\d.]+s", said, re.MULTILINE)
    wanted = ["preflight", "discover", "account", "identity", "proxy", "rules", "verify", "service"]
    told = ("22 excluded", "5432 captured", f"rules by {machine.backend}", "sudo meshnet down")
    if phases != wanted or any(words not in said for words in told):
        raise Failed(f"{machine.name}: {said}")


def up_again(machine: Machine) -> None:
    before, pid, rules = state.leftovers(machine), state.sidecar(machine), state.rules(machine)
    said = machine.run("meshnet up")
    if "nothing changed" not in said.splitlines()[-1]:
        raise Failed(f"{machine.name}: {said}")
    state.need_same(machine, before)
    if (state.sidecar(machine), state.rules(machine)) != (pid, rules):
        raise Failed(f"{machine.name}: a second up has changed sidecar or rules")


def close_settings(machine: Machine) -> None:
    """To the keeper's user, and not to the sidecar's."""
    file = "/etc/meshnet/meshnet.toml"
    machine.run(f"chgrp meshnet-proxy {file} && chmod 640 {file}")
    said = machine.run("meshnet up", code=1)
    if f"the keeper's user meshnet-rules may not read {file}" not in said or f"chmod a+r {file}" not in said:
        raise Failed(f"{machine.name}: {said}")
    machine.run(f"chgrp root {file} && chmod 644 {file}")


def need_hardened(machine: Machine) -> None:
    for unit in ("meshnet", "meshnet-rules"):
        said = machine.run(f"systemd-analyze security --no-pager {unit}.service | tail -1")
        found = re.search(rf"{unit}\.service: ([\d.]+)", said)
        if found is None or float(found[1]) > 2.0:
            raise Failed(f"{machine.name}: {said}")
        if (user := _user_of(machine, unit)) != unit:
            raise Failed(f"{machine.name}: {unit} runs as {user}")


def need_proofs(machine: Machine) -> None:
    """By the keeper as its unit lets it: in both directions and families."""

    def all_there() -> bool:
        keeper = json.loads(machine.run("meshnet status -o json"))["capture"]["keeper"]
        found = {(each["direction"], each["family"]): each["result"] for each in keeper["proofs"]}
        return all(found.get(each) == "captured" for each in _PROOFS)

    try:
        wait_for(all_there, "proofs")
    except Failed as failed:
        raise Failed(f"{machine.name}: {failed}\n{machine.run('meshnet status -o json')}") from failed


def kill_sidecar(machine: Machine) -> None:
    rules, pid = state.rules(machine), state.sidecar(machine)
    machine.run(f"kill -9 {pid}")
    wait_for(lambda: state.sidecar(machine) not in (0, pid), "another sidecar")
    machine.run("meshnet wait")
    wait_for(lambda: state.units(machine) == "active active", f"both units: {state.units(machine)}")
    if state.rules(machine) != rules:
        raise Failed(f"{machine.name}: the rules are others after the sidecar was killed")


def lose_rules(machine: Machine) -> None:
    machine.run("nft flush ruleset")
    wait_for(lambda: state.captures(machine), "the rules again")
    wait_for(lambda: "after nft (pid " in machine.run("meshnet status"), "status that tells who it was")
    rules, keeper = state.rules(machine), machine.run("systemctl show -p MainPID --value meshnet-rules").strip()
    machine.run(f"kill -9 {keeper}")
    wait_for(lambda: "keeping" in machine.run("systemctl show -p StatusText --value meshnet-rules"), "another keeper")
    if (
        state.rules(machine) != rules
        or machine.run("systemctl show -p MainPID --value meshnet-rules").strip() == keeper
    ):
        raise Failed(f"{machine.name}: the rules are others after the keeper was killed, or it lives")


def freeze_sidecar(machine: Machine) -> None:
    """Its loop stands still: the watchdog ends it. The unit's half minute is cut short for that."""
    with _drop_in(machine, "WatchdogSec=3"):
        machine.run("systemctl restart meshnet && meshnet wait")
        rules, pid = state.rules(machine), state.sidecar(machine)
        machine.run(f"kill -STOP {pid}")
        wait_for(lambda: state.sidecar(machine) not in (0, pid), "another sidecar")
        machine.run("meshnet wait")
        if state.rules(machine) != rules or "watchdog" not in machine.run(
            "journalctl -b -u meshnet -o cat -g watchdog", code=None
        ):
            raise Failed(f"{machine.name}: it was not the watchdog, or the rules are others")


def stop_between_lives(machine: Machine) -> None:
    with _drop_in(machine, "RestartSec=60"):
        machine.run("kill -9 $(systemctl show -p MainPID --value meshnet)")
        sub_state = "systemctl show -p SubState --value meshnet"
        wait_for(lambda: machine.run(sub_state).strip() == "auto-restart", "auto-restart")
        if not state.captures(machine):
            raise Failed(f"{machine.name}: the rules went with the sidecar")
        machine.run("systemctl stop meshnet")
        if state.captures(machine) or state.units(machine) != "inactive inactive":
            raise Failed(f"{machine.name}: stopped, and yet {state.units(machine)}: {state.rules(machine)}")


def start_service(machine: Machine) -> None:
    machine.run("systemctl start meshnet && meshnet wait")
    state.wait_for_capture(machine)


def restart_service(machine: Machine, other: Machine) -> None:
    """The rules' handles are those of before: they were not away for a moment. And nobody is refused, in or out."""
    rules, pid = state.rules(machine), state.sidecar(machine)
    callers = (traffic.Caller(machine, other), traffic.Caller(other, machine))
    machine.run("systemctl restart meshnet && meshnet wait")
    for caller in callers:
        caller.need_all_served()
    wait_for(lambda: state.units(machine) == "active active", f"both units: {state.units(machine)}")
    if state.rules(machine) != rules or state.sidecar(machine) == pid:
        raise Failed(f"{machine.name}: a restart has changed the rules, or started no other sidecar")


def stop_while_open(machine: Machine, captured: traffic.OpenConnection) -> None:
    stop = machine.start("systemctl stop meshnet")
    wait_for(lambda: "MESHNET_OUT" in state.rules(machine) and not state.captures(machine), "the drain set")
    captured.need_alive()
    before = state.opened(machine)
    machine.run(f"psql -qAt -h {_peer(machine)} -U postgres -c 'select 1'")
    if state.opened(machine) != before:
        raise Failed(f"{machine.name}: what is new does not go direct while the rest drains")
    captured.need_alive()
    captured.close()
    if stop.wait(40) != 0 or state.rules(machine) or state.units(machine) != "inactive inactive":
        raise Failed(f"{machine.name}: stopped, and yet {state.units(machine)}: {state.rules(machine)}")
    if stop.stdout is not None:
        stop.stdout.close()


def _peer(machine: Machine) -> str:
    return {"web": "api", "api": "web"}[machine.name]


def upgrade(machine: Machine) -> None:
    """The next version is this one with another number, and this one's keeper is root, as it used to be."""
    unit, source = "/etc/systemd/system/meshnet-rules.service", "/root/newer"
    machine.run(f"sed -Ei '/^(User|Group|AmbientCapabilities)=/d' {unit} && systemctl daemon-reload")
    machine.run("systemctl restart meshnet-rules && userdel meshnet-rules")
    if _user_of(machine, "meshnet-rules") != "root":
        raise Failed(f"{machine.name}: the older keeper is not root")
    machine.run(
        f"cp -r /vagrant {source} && sed -i 's/^__version__ = .*/__version__ = \"0.1.1\"/' {source}/meshnet/__init__.py"
    )
    machine.run(f"/opt/meshnet/bin/python -m pip install -q --no-deps {source} && rm -r {source}")
    pid = state.sidecar(machine)
    said = machine.run("meshnet up 2>&1")
    if state.sidecar(machine) != pid or "systemctl restart meshnet" not in said:
        raise Failed(f"{machine.name}: {said}")
    machine.run("systemctl restart meshnet && meshnet wait")
    if "meshnet 0.1.1" not in machine.run("meshnet status"):
        raise Failed(f"{machine.name}: {machine.run('meshnet status')}")
    state.wait_for_capture(machine)
    need_hardened(machine)


def _user_of(machine: Machine, unit: str) -> str:
    return machine.run(f"ps -o user:32= -p $(systemctl show -p MainPID --value {unit})").strip()


def full_disk(machine: Machine) -> None:
    """A small disk under the state of meshnet, and nothing left on it."""
    machine.run(
        "cp -a /var/lib/meshnet /root/state && mount -t tmpfs -o size=1m,mode=1770 tmpfs /var/lib/meshnet &&"
        " cp -a /root/state/. /var/lib/meshnet/ && rm -r /root/state"
    )
    machine.run("systemctl restart meshnet && meshnet wait && head -c 2m /dev/zero >/var/lib/meshnet/filler", code=1)
    pid = state.sidecar(machine)
    certificate = machine.run("sha256sum /var/lib/meshnet/identity/*")
    machine.run("touch /etc/meshnet/mesh.d/machines.yaml && systemctl reload meshnet")
    said = machine.run("meshnet up", code=1)
    if "No space left on device" not in said or "fix: df -h" not in said:
        raise Failed(f"{machine.name}: {said}")
    if state.sidecar(machine) != pid or machine.run("sha256sum /var/lib/meshnet/identity/*") != certificate:
        raise Failed(f"{machine.name}: a full disk has changed the sidecar or its identity")
    machine.run("rm /var/lib/meshnet/filler && meshnet up && meshnet status")
    machine.run("mkdir /root/state && cp -a /var/lib/meshnet/. /root/state/ && systemctl stop meshnet")
    machine.run("umount /var/lib/meshnet && cp -a /root/state/. /var/lib/meshnet/ && rm -r /root/state")
    start_service(machine)


def purge(machine: Machine, captured: traffic.OpenConnection | None, before: str) -> None:
    if captured is None:
        machine.run("meshnet down --purge")
    else:
        down = machine.start("meshnet down --purge")
        wait_for(lambda: not state.captures(machine), "the drain set")
        captured.need_alive()
        captured.close()
        assert down.stdout is not None
        if down.wait(60) != 0:
            raise Failed(f"{machine.name}: {down.stdout.read()}")
        down.stdout.close()
    state.need_same(machine, before)


def kill_up(machine: Machine, name: str, before: Mapping[Machine, str]) -> None:
    """At the moment when its phase `name` begins: the one before it has just been told."""
    up = machine.start("exec meshnet up")
    _read_until(up, (["discover", *PHASES])[PHASES.index(name)])
    machine.run("pkill -9 -f 'bin/meshnet [u]p'")
    up.communicate()
    state.need_same_soon(machine, before[machine])


def cut_session(guest: Machine, machine: Machine, before: str) -> None:
    session = guest.start(traffic.ssh("sudo meshnet up", to=machine.address).replace("ssh ", "ssh -tt ", 1))
    _read_until(session, "identity")
    session.kill()  # the unit goes on for a moment; what ends is what sshd sees
    machine.run("pkill -9 -u vagrant sshd")
    session.communicate()
    state.need_same_soon(machine, before)


def lose_power(machine: Machine, before: str) -> None:
    up = machine.start("exec meshnet up")
    _read_until(up, "rules")
    machine.cut_power()
    up.kill()
    up.communicate()
    if state.captures(machine) or state.units(machine) != "inactive inactive":
        raise Failed(f"{machine.name}: after the power came back: {state.units(machine)}")
    said = machine.run("meshnet up 2>&1")
    if "put back first" not in said:
        raise Failed(f"{machine.name}: {said}")
    machine.run("meshnet down --purge")
    state.need_same(machine, before)


def _read_until(up: "subprocess.Popen[str]", phase: str) -> None:
    """Until `meshnet up` has told of that phase."""
    assert up.stdout is not None
    for line in up.stdout:
        if re.match(rf". {phase} ", line):
            return
    raise Failed(f"meshnet up has ended before its phase {phase}")


@contextmanager
def _drop_in(machine: Machine, line: str) -> Iterator[None]:
    folder = "/run/systemd/system/meshnet.service.d"
    machine.run(f"mkdir {folder} && printf '[Service]\\n{line}\\n' >{folder}/tested.conf && systemctl daemon-reload")
    yield
    machine.run(f"rm -r {folder} && systemctl daemon-reload")


def checkout() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:

        def shipped(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
            name = Path(member.name).name
            return None if name in _NOT_SHIPPED or name.endswith((".so", ".egg-info")) else member

        archive.add(image.ROOT, ".", filter=shipped)
    return content.getvalue()
