"""Hosts made of network namespaces, for every test with sockets, and what only tests need on top.

The builder itself is `meshnet_cli.demo.world`; meshnet on its hosts is `meshnet_cli.demo.mesh`. As a pytest plugin this
file moves the whole run into namespaces of its own before anything else starts, so no test can reach the host.

    def test_a_client_reaches_a_server(world):
        web, api = world.host("web"), world.host("api")
"""

import os
import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio

from meshnet.errors import CommandError
from meshnet_cli.demo.mesh import Mesh, Sidecar
from meshnet_cli.demo.sandbox import enter_sandbox
from meshnet_cli.demo.world import Host, Process, ProgramFailed, World, wait_for

__all__ = [
    "SLOWNESS",
    "Host",
    "Mesh",
    "Process",
    "ProgramFailed",
    "Sidecar",
    "World",
    "eventually",
    "into_the_mesh",
    "mesh",
    "stand_still",
    "still_alive",
    "wait_for",
    "world",
]

T = TypeVar("T")

_refusal: CommandError | None = None


def pytest_configure() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # hundreds of connections at once, several sockets each
    # Here, while there is one thread: later the kernel would refuse a user namespace.
    global _refusal
    try:
        enter_sandbox()
    except CommandError as error:
        _refusal = error


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """An empty world. When the test fails, its report shows the end of every log."""
    if _refusal:
        pytest.fail(f"{_refusal.what}: {_refusal.why}; {_refusal.fix}")
    with World() as built:
        yield built
        for host in built.hosts.values():
            for process in host.processes:
                if text := process.output:
                    request.node.add_report_section("teardown", f"{host.name}: {process.name}", text[-4000:])


@pytest.fixture
def mesh(world: World) -> Mesh:
    """The mesh of `world`: no resources, no sidecars yet."""
    return Mesh(world)


def into_the_mesh(mesh: Mesh, hosts: Iterable[Host], **sections: dict[str, Any]) -> None:
    """A sidecar on each of them, ready, and the redirect rules: quicker than one after the other by commands."""
    sidecars = [mesh.sidecar(host, start=False, **sections) for host in hosts]
    for sidecar in sidecars:
        sidecar.spawn()
    for sidecar in sidecars:
        sidecar.wait_until_ready()
        sidecar.capture()


def still_alive(mesh: Mesh, request: pytest.FixtureRequest) -> None:
    """Every sidecar that was started lives; when the test fails, its report shows the end of their logs."""
    for sidecar in mesh.sidecars.values():
        if sidecar.process is not None:
            request.node.add_report_section("teardown", sidecar.host.name, sidecar.process.output[-4000:])
            assert sidecar.process.alive, f"the sidecar of {sidecar.host.name} did not live to the end of the test"


def stand_still(pid: int) -> None:
    """SIGSTOP, and every thread of the process has obeyed: each does so in its own time."""
    os.kill(pid, signal.SIGSTOP)

    def all_stopped() -> bool:
        stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
        return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)

    wait_for(all_stopped, what=f"process {pid} stands still")


SLOWNESS = float(os.environ.get("MESHNET_TEST_SLOWNESS", "1"))
"""How many times as long as by itself everything takes: what looks on, valgrind say, makes it slow."""


async def eventually(condition: Callable[[], T], *, timeout: float = 10.0, what: str = "") -> T:
    """`wait_for` on trio's clock: other tasks run meanwhile, and a MockClock makes it quick."""
    deadline = trio.current_time() + timeout * SLOWNESS
    while not (value := condition()):
        if trio.current_time() > deadline:
            raise TimeoutError(f"{what or condition}: not in {timeout} s; saw {value!r}")
        await trio.sleep(0.01)
    return value
