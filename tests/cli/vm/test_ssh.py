"""The way in by SSH is found, and not captured unless that is wanted by name."""

import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshnet.errors import CommandError
from meshnet.model.settings import CaptureSection, Settings
from meshnet_cli.vm import ssh
from tests.cli.machine import Machine
from tests.world import Host, World, wait_for

pytestmark = pytest.mark.netns

ALL = Settings(capture=CaptureSection(exclude_inbound_ports=()))

# A program that is called sshd, as the kernel shows it, and listens.
SSHD = (
    "import ctypes, socket, signal; ctypes.CDLL(None).prctl(15, b'sshd', 0, 0, 0);"
    " s = socket.create_server(('0.0.0.0', 2222)); signal.pause()"
)


@pytest.fixture
def host(world: World) -> Host:
    return world.host("vm")


@pytest.fixture
def session(host: Host) -> Iterator[tuple[socket.socket, str]]:
    """A connection to port 2200 of `host`, and what sshd would say of it."""
    with host.open_socket(socket.AF_INET) as server:
        server.bind(("0.0.0.0", 2200))
        server.listen()
        with host.connect(host.address, 2200) as client:
            accepted, (address, port) = server.accept()
            with accepted:
                yield accepted, f"{address} {port} {host.address} 2200"
            del client


def test_a_program_called_sshd_is_found_by_where_it_listens(host: Host) -> None:
    program = host.spawn(sys.executable, "-c", SSHD)
    with host.entered():
        wait_for(lambda: ssh.ports() == {2222}, what="the port of sshd")
        with pytest.raises(CommandError, match="would capture port 2222"):
            ssh.need_safe(ALL, (), "meshnet up")
        ssh.need_safe(ALL, ("lose-ssh",), "meshnet up")
        ssh.need_safe(Settings(capture=CaptureSection(exclude_inbound_ports=("2000-3000",))), (), "meshnet up")
        ssh.need_safe(Settings(capture=CaptureSection(inbound_ports=("80",), exclude_inbound_ports=())), (), "")
    assert program.alive


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("", {22}),
        ('# Port 2222\nPort 2022\nport=2023\nPort "2024"\nPort many\nPort\n', {2022, 2023, 2024}),
        ("ListenAddress 10.0.0.1:2024\nListenAddress [fd00::1]:2025\nListenAddress fd00::1\n", {22, 2024, 2025}),
        ("ListenAddress 10.0.0.1\nPasswordAuthentication no\n", {22}),
    ],
)
def test_what_sshd_is_told_counts_where_somebody_listens_for_it(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, found: set[int]
) -> None:
    """systemd's socket, or an sshd whose descriptors may not be looked at."""
    monkeypatch.setattr(ssh, "_SSHD", tmp_path)
    with host.open_socket(socket.AF_INET) as other, host.entered():
        other.bind(("0.0.0.0", 80))
        other.listen()
        assert ssh.ports() == set()
        (tmp_path / "sshd_config").write_text("Include /etc/ssh/sshd_config.d/*.conf\n")
        (tmp_path / "sshd_config.d").mkdir()
        (tmp_path / "sshd_config.d" / "ours.conf").write_text(written)
        assert ssh.ports() == set()
        for port in found:
            with host.open_socket(socket.AF_INET) as server:
                server.bind(("0.0.0.0", port))
                server.listen()
                assert ssh.ports() == {port}


def test_where_sshds_configuration_is_closed_whatever_root_listens_for_may_be_it(host: Host, tmp_path: Path) -> None:
    """For the keeper, which is not root on a host of systemd's, and must not capture the way in."""
    (tmp_path / "sshd_config").write_text("Port 2222\n")
    script = "import sys; from pathlib import Path; from meshnet_cli.vm import ssh; ssh._SSHD = Path(sys.argv[1]);"
    script += "print(sorted(ssh.ports(cautious=True)), sorted(ssh.ports()))"
    limited = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--", sys.executable, "-c", script, tmp_path)
    with host.open_socket(socket.AF_INET) as server:
        server.bind(("0.0.0.0", 8022))
        server.listen()
        assert host.run(*limited, PYTHONPATH=os.pathsep.join(sys.path)).stdout == "[] []\n"
        (tmp_path / "sshd_config").chmod(0)
        assert host.run(*limited, PYTHONPATH=os.pathsep.join(sys.path)).stdout == "[8022] []\n"


def test_the_session_counts_that_this_process_is_in(host: Host, session: tuple[socket.socket, str]) -> None:
    _, said = session
    # As sudo does: the variable is gone, but a process further up has it.
    script = "import os; from meshnet_cli.vm import ssh; print(sorted(ssh.ports()), os.environ.get('SSH_CONNECTION'))"
    done = host.run(
        "sh", "-c", 'env -u SSH_CONNECTION "$0" -c "$1"; true', sys.executable, script, SSH_CONNECTION=said,
        PYTHONPATH=os.pathsep.join(sys.path),
    )  # fmt: skip
    assert done.stdout == "[2200] None\n"


def test_a_session_with_another_host_does_not_count(host: Host) -> None:
    script = "from meshnet_cli.vm import ssh; print(sorted(ssh.ports()))"
    done = host.run(
        sys.executable, "-c", script, SSH_CONNECTION="10.0.0.1 5 10.0.0.2 22", PYTHONPATH=os.pathsep.join(sys.path)
    )
    assert done.stdout == "[]\n"


def test_what_the_keeper_refused_is_taken_by_what_it_said_to_type(machine: Machine) -> None:
    machine.configure("[capture]\nexclude_inbound_ports = ['2222']\n")
    machine.host.spawn(sys.executable, "-c", SSHD)
    wait_for(lambda: machine.host.listens(2222), what="sshd")
    machine.up()
    machine.configure("[capture]\nexclude_inbound_ports = []\n")
    (keeper,) = machine.keepers()
    os.kill(keeper, signal.SIGHUP)

    def problem() -> str:
        capture = machine.status().capture
        return capture.keeper.problem if capture is not None and capture.keeper is not None else ""

    told = wait_for(lambda: text if "would capture port 2222" in (text := problem()) else None, timeout=30.0, what="it")
    *command, _ = told.rpartition("sudo meshnet ")[2].split()
    done = machine.meshnet(*command, "--accept-risk=lose-ssh")
    assert done.returncode == 0, done.stdout + done.stderr
    wait_for(lambda: not problem(), timeout=30.0, what="settings that are taken")
    assert "dport 2222 " not in machine.rules()


@pytest.mark.parametrize("command", [("up",), ("init",), ("set", "log.level=debug")])
def test_commands_refuse_to_capture_the_way_in(machine: Machine, command: tuple[str, ...]) -> None:
    machine.configure("[capture]\nexclude_inbound_ports = []\n")
    program = machine.host.spawn(sys.executable, "-c", SSHD)
    with machine.host.entered():
        wait_for(lambda: ssh.ports() == {2222}, what="the port of sshd")
    rules, settings = machine.rules(), machine.config.read_text()
    config = () if command[0] == "up" else ("--config", str(machine.config))
    done = machine.meshnet(*command, *config)
    assert done.returncode == 1
    assert "error: this would capture port 2222, by which SSH reaches this host\n" in done.stderr
    assert "--accept-risk=lose-ssh\n" in done.stderr
    assert (machine.rules(), machine.config.read_text()) == (rules, settings)
    accepted = machine.meshnet(*command, *config, "--accept-risk=lose-ssh")
    assert accepted.returncode == 0, accepted.stderr
    assert program.alive


@pytest.mark.parametrize("command", [("up",), ("init",), ("set", "capture.readiness_port=2222")])
def test_nor_by_the_port_at_which_readiness_is_asked_for(machine: Machine, command: tuple[str, ...]) -> None:
    """Whose rule is ahead of all that is left alone."""
    left_alone = "[capture]\nexclude_inbound_ports = ['2222']\n"
    machine.configure(left_alone if command[0] == "set" else f"{left_alone}readiness_port = 2222\n")
    machine.host.spawn(sys.executable, "-c", SSHD)
    wait_for(lambda: machine.host.listens(2222), what="sshd")
    rules, settings = machine.rules(), machine.config.read_text()
    config = () if command[0] == "up" else ("--config", str(machine.config))
    done = machine.meshnet(*command, *config)
    assert done.returncode == 1
    assert "error: this would capture port 2222, by which SSH reaches this host\n" in done.stderr
    assert "fix: sudo meshnet set capture.readiness_port=15124; or " in done.stderr
    assert (machine.rules(), machine.config.read_text()) == (rules, settings)
