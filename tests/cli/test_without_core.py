"""Hosts that cannot have the native relay: the Python relay serves there, and what is missing is said everywhere."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from meshnet.control.authority import Authority, save_issued
from meshnet.model.connection import Security
from tests.cli.machine import Machine, talk
from tests.cli.sidecar import ROOT
from tests.proxy.programs import accept, listen
from tests.world import Host

pytestmark = pytest.mark.netns

_API, _TRUST = "10.96.0.10", "spiffe://local/ns/default/sa"
_SERVICE = """
apiVersion: meshnet.dev/v1
kind: Service
metadata: {name: api}
spec:
  addresses: [%s]
  ports: [{port: 8080}]
  endpoints: [{address: %s, tunnel: meshnet, identity: %s/api}]
"""
# Python's own ssl has OpenSSL linked to it, so it goes on working, as one with an OpenSSL of its own does.
_NO_LIBSSL = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>
void *dlopen(const char *file, int flags)
{
    void *(*real)(const char *, int) = (void *(*)(const char *, int))dlsym(RTLD_NEXT, "dlopen");
    return real(file && !strcmp(file, "libssl.so.3") ? "there-is-no-libssl.so.3" : file, flags);
}
"""


@dataclass(frozen=True)
class Lack:
    """`environment`: of commands on such a host."""

    environment: dict[str, str]
    why: str
    fix: str


def install(source: Path, folder: Path, **environment: str) -> None:
    """By pip, in `folder`, with no network, from a copy of this tree in `source`, for pip leaves its work there."""
    for top in ("meshnet", "cli", "init"):
        shutil.copytree(ROOT / top, source / top, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*pip, "--target", folder, source],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory: pytest.TempPathFactory) -> Lack:
    folder = tmp_path_factory.mktemp("installed")
    install(tmp_path_factory.mktemp("source"), folder, CC="false")
    native = folder / "meshnet" / "relay" / "native"
    assert (native / "_core.pyi").exists()
    assert not list(native.glob("_core*.so"))
    # Safe: the working directory, where there is a core, does not come first.
    return Lack({"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}, "not built", "install gcc")


@pytest.fixture(scope="module")
def without_libssl(tmp_path_factory: pytest.TempPathFactory) -> Lack:
    shim = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-xc", "-", "-o", shim], input=_NO_LIBSSL, text=True, check=True)
    return Lack({"LD_PRELOAD": str(shim)}, "no libssl.so.3 on this machine", "install the libraries of OpenSSL 3")


@pytest.fixture(params=["without_compiler", "without_libssl"])
def lack(request: pytest.FixtureRequest) -> Lack:
    found: Lack = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def machine(machine: Machine, lack: Lack) -> Machine:
    machine.environment |= lack.environment
    return machine


def test_check_says_what_is_missing_and_what_mends_it(machine: Machine, lack: Lack) -> None:
    for relay, level in (("auto", "warning"), ("native", "error")):
        machine.configure(f"[proxy]\nrelay = '{relay}'\n")
        done = machine.meshnet("check", "--config", str(machine.config), "-o", "json")
        found = next(item for item in json.loads(done.stdout)["items"] if item["code"] == "relay.native")
        assert (found["level"], found["what"]) == (level, "the native relay is not here")
        assert found["why"] == f"{lack.why}; the Python relay takes several times the processor"
        assert found["fix"].startswith(lack.fix)
        assert ("gcc" in found["fix"], "OpenSSL" in found["fix"]) == ("gcc" in lack.fix, "OpenSSL" in lack.fix)


@pytest.mark.parametrize("workers", [1, 2])
def test_who_asks_for_it_by_name_is_told_at_once(machine: Machine, lack: Lack, workers: int) -> None:
    machine.configure(f"[proxy]\nrelay = 'native'\nworkers = {workers}\n")
    done = machine.meshnet("proxy", "--config", str(machine.config))
    assert done.returncode == 1
    assert "the native relay was asked for and is not here\n" in done.stderr
    assert f"{lack.why}\n" in done.stderr
    assert lack.fix in done.stderr
    assert "Traceback" not in done.stderr


def test_the_python_relay_serves_and_log_and_status_say_why(machine: Machine, peer: Host, lack: Lack) -> None:
    machine.configure("[proxy]\nworkers = 2\n")
    machine.up()
    assert machine.log.read_text().count(f"relay: python, not native: {lack.why}\n") == 1
    said = machine.meshnet("status").stdout
    assert f"relay         python\n              not native: {lack.why}\n" in said
    with listen(peer, 8080) as server, machine.host.connect(peer.address, 8080) as client, accept(server) as app:
        assert talk(client, app)
    assert [record.relay for record in machine.connections()] == ["python"]


def test_two_such_hosts_call_each_other_through_a_tunnel(new_machine: Callable[[str], Machine], lack: Lack) -> None:
    web, api = (new_machine(name) for name in ("web", "api"))
    now = datetime.now(UTC)
    authority = Authority.create("local", now=now)
    for name, machine in (("web", web), ("api", api)):
        machine.environment |= lack.environment
        save_issued(authority.issue(f"{_TRUST}/{name}", now=now, ttl=timedelta(hours=1)), machine.identity)
        machine.mesh.mkdir()
        (machine.mesh / "api.yaml").write_text(_SERVICE % (_API, api.host.address, _TRUST))
        machine.up()
        assert f"relay: python, not native: {lack.why}\n" in machine.log.read_text()
    with listen(api.host, 8080) as server, web.host.connect(_API, 8080) as client, accept(server) as app:
        assert talk(client, app)
    seen = [record for machine in (web, api) for record in machine.connections()]
    assert [(record.relay, record.tls.mode) for record in seen] == [("python", Security.MTLS)] * 2
