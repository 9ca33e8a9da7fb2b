"""The demonstration: its proofs hold on a mesh, and fail where what they claim is not so."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from meshnet_cli.demo import proofs
from meshnet_cli.demo.programs import HTTP_PORT, LINE_PORT
from meshnet_cli.demo.proofs import Before, NotHeld
from meshnet_cli.demo.stage import API_ADDRESS, API_ADDRESS6, Stage
from tests.world import ProgramFailed, World

pytestmark = pytest.mark.netns


def test_every_proof_holds_on_a_mesh_and_nothing_is_left_of_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "meshnet_cli.main", "demo", "--json"],
        capture_output=True,
        text=True,
        timeout=110,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert not done.stderr
    report = json.loads(done.stdout)
    assert [proof for proof in report["proofs"] if not proof["held"]] == []
    assert (report["held"], done.returncode) == (True, 0)
    assert {proof["name"] for proof in report["proofs"]} >= set(proofs.PROOFS)


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
