"""The builder of worlds itself: what it promises to every other test."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import yaml

from meshnet.model.resource import AnyResource
from meshnet_cli.demo import sandbox
from meshnet_cli.demo.wire import Capture, payload_ports
from tests.world import Mesh, ProgramFailed, World, wait_for

pytestmark = pytest.mark.netns

SERVER = """
import socket, sys
listener = socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True)
print("listening")
while True:
    client, peer = listener.accept()
    client.sendall(peer[0].encode())
    client.close()
"""


def test_four_hosts_stand_in_well_under_a_second(world: World) -> None:
    begun = time.monotonic()
    for name in ("web", "api-1", "api-2", "api-3"):
        world.host(name)
    assert time.monotonic() - begun < 0.5


@pytest.mark.parametrize("family", ["address", "address6"])
def test_hosts_reach_each_other_at_once_in_both_families(world: World, family: str) -> None:
    web, api = world.host("web"), world.host("api")
    api.spawn(sys.executable, "-c", SERVER, "8080", name="server")
    wait_for(lambda: api.listens(8080))
    with web.connect(getattr(api, family), 8080) as client:
        assert client.recv(100).decode().removeprefix("::ffff:") == getattr(web, family)


def test_a_host_does_not_see_another_ones_loopback(world: World) -> None:
    web, api = world.host("web"), world.host("api")
    api.spawn(sys.executable, "-c", SERVER, "8080", name="server")
    wait_for(lambda: api.listens(8080))
    with pytest.raises(ConnectionRefusedError):
        web.connect("127.0.0.1", 8080)


@pytest.mark.parametrize("address", ["10.96.0.10", "fd96::10"])
def test_packets_to_service_addresses_have_a_route_and_nobody_there(world: World, address: str) -> None:
    web = world.host("web")
    assert "eth0" in web.run("ip", "route", "get", address).stdout
    with pytest.raises(OSError, match=r"No route to host|Network is unreachable"):
        web.connect(address, 80)


def test_a_redirect_rule_of_one_host_gives_the_original_destination(world: World) -> None:
    web = world.host("web")
    chain = "type nat hook output priority -100; tcp dport 80 redirect to 81;"
    web.run("nft", "-f", "-", stdin=f"table ip t {{ chain c {{ {chain} }}; }}")
    with web.open_socket() as listener:
        listener.bind(("127.0.0.1", 81))
        listener.listen()
        with web.connect("10.96.0.10", 80):
            accepted, _ = listener.accept()
            with accepted:
                original = accepted.getsockopt(socket.SOL_IP, 80, 16)
    assert original[2:8] == bytes([0, 80, 10, 96, 0, 10])
    other = world.host("other")
    assert other.run("nft", "list", "ruleset").stdout == ""


@pytest.mark.parametrize("family", ["address", "address6"])
def test_a_capture_on_the_switch_sees_what_passes_between_hosts(world: World, family: str) -> None:
    web, api = world.host("web"), world.host("api")
    api.spawn(sys.executable, "-c", SERVER, "8080", name="server")
    wait_for(lambda: api.listens(8080))
    with (
        Capture(world.switch, getattr(web, family).encode()) as capture,
        web.connect(getattr(api, family), 8080) as client,
    ):
        assert client.recv(100)
    # Into the switch on one port, out of it on another.
    assert capture.with_marker == 2
    assert capture.lost == 0
    assert 8080 in capture.tcp_ports
    with Capture(world.switch, b"marker") as quiet:
        web.connect(getattr(api, family), 8080).close()
    assert quiet.frames > 0
    assert quiet.with_marker == 0


def test_frames_without_tcp_payload_have_no_ports() -> None:
    ethernet = bytes(12)
    handshake = (
        bytes.fromhex("0800 4500 0028 0000 4000 4006 0000 0a4d0002 0a4d0003 1f90 1b58")
        + bytes(8)
        + b"\x50\x10"
        + bytes(6)
    )
    with_payload = handshake.replace(b"\x00\x28", b"\x00\x29", 1) + b"x"
    assert payload_ports(ethernet + handshake) == set()
    assert payload_ports(ethernet + with_payload) == {8080, 7000}
    for length in range(len(ethernet + handshake)):
        assert payload_ports((ethernet + with_payload)[:length]) == set()


def test_what_a_mesh_writes_are_resources_in_one_file_that_is_replaced(world: World) -> None:
    api = world.host("api")
    mesh = Mesh(world)
    for port in (8080, 9090):
        mesh.write(mesh.service("api", [port], [api], addresses=["10.96.0.10"]))
    (file,) = mesh.directory.iterdir()
    (service,) = yaml.safe_load_all(file.read_text())
    assert msgspec.convert(service, AnyResource) == mesh.service("api", [9090], [api], addresses=["10.96.0.10"])


def test_this_process_is_in_a_network_of_its_own_with_a_loopback() -> None:
    links = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in links.splitlines()] == ["lo"]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        socket.create_connection(listener.getsockname()).close()


def test_entering_a_host_ends_with_the_block_even_by_an_error(world: World) -> None:
    web = world.host("web")
    before = os.readlink("/proc/thread-self/ns/net")
    with pytest.raises(ZeroDivisionError), web.entered():
        assert os.readlink("/proc/thread-self/ns/net") != before
        _ = 1 / 0
    assert os.readlink("/proc/thread-self/ns/net") == before


def test_a_failing_program_says_where_what_and_why(world: World) -> None:
    with pytest.raises(ProgramFailed, match=r"web: ls /nowhere ended with 2\n.*No such file"):
        world.host("web").run("ls", "/nowhere")


def test_a_wait_in_vain_says_what_was_seen(world: World) -> None:
    web = world.host("web")
    with pytest.raises(TimeoutError, match=r"a server: not in 0\.05 s; saw ConnectionRefusedError"):
        wait_for(lambda: web.connect("127.0.0.1", 1), timeout=0.05, what="a server")


def test_nothing_is_left_of_a_world_that_ended() -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with World() as world:
        server = world.host("web").spawn(sys.executable, "-c", SERVER, "8080", name="server")
        wait_for(lambda: "listening" in server.output)
    assert not Path(f"/proc/{server.pid}").exists()
    assert not world.directory.exists()
    assert len(os.listdir("/proc/self/fd")) == descriptors


BUILDER = """
import time
from meshnet_cli.demo.sandbox import enter_sandbox
from meshnet_cli.demo.world import World
enter_sandbox()
with World() as world:
    print(world.host("web").spawn("sleep", "1000").pid, world.directory, flush=True)
    while True:
        time.sleep(0.05)
"""


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_programs_die_with_a_builder_that_is_killed_and_its_files_soon_after(by: signal.Signals) -> None:
    with _builder(BUILDER) as builder:
        assert builder.stdout is not None
        pid, directory = builder.stdout.readline().split()
        builder.send_signal(by)
        builder.wait()
        # A grandchild of ours is reaped by whoever adopts it: gone or a zombie, both are dead.
        wait_for(lambda: _is_dead(pid), what=f"the end of {pid}")
        if by == signal.SIGKILL:
            assert Path(directory).exists()
            World().close()
        assert not Path(directory).exists()


def test_a_new_world_removes_nothing_but_what_a_run_of_ours_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "owner").touch()
    (tmp_path / "meshnet-world-link").symlink_to(elsewhere)
    unowned, strange, linked = (tmp_path / f"meshnet-world-{name}" for name in ("unowned", "strange", "linked"))
    for folder in (unowned, strange, linked):
        folder.mkdir()
    (strange / "owner").touch()
    if int(Path("/proc/self/uid_map").read_text().split()[2]) > 1:  # else there is nobody but us
        os.chown(strange, 65534, 65534)
    else:
        (strange / "owner").unlink()
    (linked / "owner").symlink_to(elsewhere / "owner")
    with World() as kept:
        kept.keep = True
    with World() as running:
        World().close()
        assert (running.directory / "switch").is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {
        "elsewhere",
        "meshnet-world-link",
        "meshnet-world-linked",
        "meshnet-world-strange",
        "meshnet-world-unowned",
        kept.directory.name,
    }
    assert (elsewhere / "owner").exists()


# Become somebody else after importing: this Python may lie where only root can read. Giving root up makes a process'
# /proc entries root's (prctl 4 is PR_SET_DUMPABLE); an exec, or this, gives them back.
AS_NOBODY = "import ctypes, os; os.setgroups([]); os.setgid(65534); os.setuid(65534); ctypes.CDLL(None).prctl(4, 1)"


def test_an_ordinary_user_builds_a_world_too() -> None:
    if int(Path("/proc/self/uid_map").read_text().split()[2]) == 1:
        return  # we are one, so every test here has shown it
    look = "    print(world.host('db').run('ip', '-brief', 'address').stdout)\n"
    code = BUILDER.replace("enter_sandbox()\n", f"{AS_NOBODY}\nenter_sandbox()\n", 1)
    code = code.replace("    while True:\n        time.sleep(0.05)\n", look)
    with _builder(code) as builder:
        output, _ = builder.communicate()
        assert builder.returncode == 0
        assert "10.77.0.3/24 fd77::3/64" in output


def test_entering_the_sandbox_twice_is_once() -> None:
    before = os.readlink("/proc/self/ns/net")
    sandbox.enter_sandbox()
    assert os.readlink("/proc/self/ns/net") == before


def _is_dead(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _builder(code: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
