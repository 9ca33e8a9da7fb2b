"""The demonstration: its proofs hold on a mesh, and fail where what they claim is not so."""

import functools
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshnet.model.admin import GetStatus, Status
from meshnet_cli.client import ask
from meshnet_cli.demo import proofs
from meshnet_cli.demo.cli import fetch
from meshnet_cli.demo.programs import HTTP_PORT, LINE_PORT
from meshnet_cli.demo.proofs import Before, NotHeld
from meshnet_cli.demo.stage import API_ADDRESS, API_ADDRESS6, Stage
from tests.world import ProgramFailed, World

pytestmark = pytest.mark.netns


@pytest.fixture
def tmp() -> Iterator[Path]:
    """Not pytest's tmp_path: the path of a UNIX socket has 107 bytes."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def demo(tmp: Path, *arguments: str) -> subprocess.Popen[str]:
    """`meshnet demo` with a /tmp of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "meshnet_cli.main", "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1", "TMPDIR": str(tmp)},
    )


@pytest.mark.parametrize("relay", ["native", "python"])
def test_every_proof_holds_whichever_relay_moves_the_bytes(
    tmp: Path, relay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESHNET_RELAY", relay)
    with demo(tmp, "--json") as running:
        stdout, stderr = running.communicate(timeout=110)
    assert running.returncode == 0, stdout + stderr


def test_every_proof_holds_on_a_mesh_that_can_be_entered_and_nothing_is_left_of_it(tmp: Path) -> None:
    with demo(tmp, "--stay", "--json") as running:
        assert running.stderr is not None
        said = []
        for line in running.stderr:
            said.append(line)
            if line.startswith("Resources: "):
                break
        fetching = next(line for line in said if f"http://{API_ADDRESS}:{HTTP_PORT}/" in line)
        fetched = subprocess.run(["sh", "-c", fetching], capture_output=True, text=True)
        [hosts] = tmp.glob("*/hosts")
        verified = subprocess.run([hosts / "web", "meshnet", "rules", "verify", "-o", "json"], capture_output=True)
        settings = hosts.parent / "api-1" / "meshnet" / "meshnet.toml"
        os.kill(ask(str(settings.with_name("admin.sock")), GetStatus(), Status).pid, signal.SIGKILL)
        entered = subprocess.run([hosts / "api-1", "sh", "-c", "echo $MESHNET_CONFIG"], capture_output=True, text=True)
        again = subprocess.run([hosts / "api-1", "meshnet", "up"], capture_output=True, text=True)
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate(timeout=30)
    assert again.returncode == 0, again.stderr
    assert json.loads(verified.stdout)["sidecar"] == "fits", verified.stderr
    assert (entered.stdout, entered.returncode) == (f"{settings}\n", 0), entered.stderr
    assert (
        said[0] == "The mesh stays up until Ctrl-C. From another terminal, a command on one of the hosts, here web:\n"
    )
    assert fetched.stdout.strip() in {"api-1", "api-2", "api-3"}, fetched.stderr
    assert not stderr.strip()
    report = json.loads(stdout)
    assert [proof for proof in report["proofs"] if not proof["held"]] == []
    assert (report["held"], running.returncode) == (True, 0)
    assert {proof["name"] for proof in report["proofs"]} >= set(proofs.PROOFS)
    assert list(tmp.iterdir()) == []
    pattern = rf"(proxy|supervise).*{re.escape(str(settings))}"
    assert subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout == ""


@pytest.mark.parametrize(("by", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_demo_that_is_stopped_says_so_and_leaves_nothing(tmp: Path, by: signal.Signals, status: int) -> None:
    with demo(tmp) as running:
        assert running.stdout is not None
        assert "five hosts" in running.stdout.readline()
        running.send_signal(by)
        running.send_signal(by)
        _, stderr = running.communicate(timeout=30)
    assert (stderr, running.returncode) == ("Stopped before the end. Nothing is left of it.\n", status)
    assert list(tmp.iterdir()) == []


def test_a_sidecar_that_cannot_start_is_shown_with_its_last_words(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHNET_LOG__LEVEL", "loud")
    with demo(tmp) as running:
        stdout, _ = running.communicate(timeout=60)
    assert running.returncode == 1
    failed, *words = stdout.partition("✗ ")[2].splitlines()[:4]
    assert failed.startswith("mesh up")
    assert [word.split()[0] for word in words] == ["error:", "why:", "fix:"]
    assert "MESHNET_LOG__LEVEL" in words[1]


def test_what_to_type_works_with_the_programs_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("hello")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        typed = fetch(url, path=str(tmp_path))
        done = subprocess.run(["/bin/sh", "-c", typed], capture_output=True, text=True, env={"PATH": str(tmp_path)})
        server.shutdown()
    assert (done.stdout.strip(), done.stderr) == ("hello", "")
    (tmp_path / "curl").touch(mode=0o755)
    assert fetch(url, path=str(tmp_path)) == f"curl -s {url}"


def test_a_machine_that_refuses_user_namespaces_is_told_what_to_type() -> None:
    # Root of a user namespace that may have no further ones, without the capability to do without.
    refusing = "echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-sys_admin"
    done = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", f'{refusing} "$@"', "sh", sys.executable, "-m", "meshnet_cli.main", "demo"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: cannot make network namespaces without root",
        "why: this machine refuses unprivileged user namespaces (user.max_user_namespaces = 0)",
        "fix: run the same command with sudo: it still stays inside namespaces of its own",
    ]


@pytest.fixture
def plain(world: World) -> Iterator[tuple[Stage, Before]]:
    """The demonstration's hosts with sidecars and rules, but endpoints without a tunnel, and nobody denied."""
    stage = Stage(world)
    before = Before(stage)
    ports, addresses = [HTTP_PORT, LINE_PORT], [API_ADDRESS, API_ADDRESS6]
    stage.mesh.write(stage.mesh.service("api", ports, stage.apis, addresses=addresses, meshed=False))
    stage.up()
    yield stage, before
    before.close()


def test_the_proofs_fail_where_nothing_is_encrypted_or_denied(plain: tuple[Stage, Before]) -> None:
    assert proofs.load_is_spread(*plain)
    with pytest.raises(NotHeld, match="frames show the marker"):
        proofs.never_in_plain_text(*plain)
    with pytest.raises(NotHeld, match="says plain, not mtls"):
        proofs.identities_verified(*plain)
    with pytest.raises(NotHeld, match="says plain, not mtls"):
        proofs.bytes_intact(*plain)
    with pytest.raises(NotHeld, match="the denied client was let in"):
        proofs.denied_client_is_told_why(*plain)


def test_the_proofs_fail_where_a_server_or_an_old_connection_is_gone(plain: tuple[Stage, Before]) -> None:
    stage, before = plain
    stage.servers["api-1"].kill()
    with pytest.raises((NotHeld, ProgramFailed), match=r"only these answered|reset by peer"):
        proofs.load_is_spread(stage, before)
    with pytest.raises(NotHeld, match="a connection opened before `up` died"):
        proofs.open_connections_survive(stage, before)
    for host in stage.apis:
        stage.servers[host.name].kill()
    with pytest.raises(NotHeld, match="a call failed"):
        proofs.killed_server_is_taken_out(stage, before)
