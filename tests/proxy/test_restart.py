"""A restart while the files are bad: what was meshed stays meshed, what was denied stays denied, or nothing passes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from meshnet.errors import CommandError
from meshnet.model.connection import Security
from meshnet_cli.demo.mesh import Sidecar
from tests.proxy.conftest import API, Hosts
from tests.proxy.programs import Records, accept, converse, is_reset, listen, nobody_came, reason
from tests.proxy.test_config import BROKEN, policy
from tests.world import wait_for

pytestmark = pytest.mark.netns


@pytest.fixture
def broken(hosts: Hosts) -> Iterator[Path]:
    """A file to write BROKEN to; afterwards it is gone and every sidecar is ready again."""
    file = hosts.mesh.directory / "broken.yaml"
    yield file
    file.unlink(missing_ok=True)
    for sidecar in hosts.mesh.sidecars.values():
        wait_for(lambda sidecar=sidecar: sidecar.status().ready)


@pytest.fixture
def without_files(hosts: Hosts) -> Iterator[None]:
    """As of a volume that is not mounted; afterwards they are there again, and in force."""
    file, aside = hosts.mesh.directory / "mesh.yaml", hosts.world.directory / "aside"
    file.rename(aside)
    yield
    aside.rename(file)
    for sidecar in hosts.mesh.sidecars.values():
        wait_for(lambda sidecar=sidecar: not problem_of(sidecar) and sidecar.status().ready)


def restart(sidecar: Sidecar, broken: Path | None = None) -> None:
    assert sidecar.process is not None
    sidecar.process.kill()
    if broken is not None:
        broken.write_text(BROKEN)
    sidecar.spawn()
    wait_for(lambda: problem_of(sidecar), what="the files are refused")


def problem_of(sidecar: Sidecar) -> str:
    try:
        return sidecar.status().config.problem
    except CommandError:
        return ""


def test_a_meshed_endpoint_is_still_reached_through_its_tunnel(hosts: Hosts, broken: Path) -> None:
    sidecar = hosts.sidecar(hosts.web)
    restart(sidecar, broken)
    assert sidecar.status().ready
    with listen(hosts.api, 8080) as server:
        out = Records(sidecar)
        converse(hosts.web.connect(API, 8080), accept(server))
        converse(hosts.web.connect(hosts.api.address, 8080), accept(server))
    assert [record.tls.mode for record in out.ended(2)] == [Security.MTLS, Security.MTLS]


@pytest.mark.usefixtures("without_files")
def test_a_meshed_endpoint_is_no_plain_one_because_the_files_are_gone(hosts: Hosts) -> None:
    sidecar = hosts.sidecar(hosts.web)
    restart(sidecar)
    assert "no *.yaml file is left" in problem_of(sidecar)
    assert sidecar.status().ready
    with listen(hosts.api, 8080) as server:
        out = Records(sidecar)
        converse(hosts.web.connect(API, 8080), accept(server))
        converse(hosts.web.connect(hosts.api.address, 8080), accept(server))
    assert [record.tls.mode for record in out.ended(2)] == [Security.MTLS, Security.MTLS]


def test_who_was_denied_is_still_denied(hosts: Hosts, broken: Path) -> None:
    hosts.write(policy("not-web", hosts.mesh.identity("web")))
    sidecar = hosts.sidecar(hosts.api)
    restart(sidecar, broken)
    with listen(hosts.api, 8080) as server:
        assert is_reset(hosts.web, API, 8080)
        assert nobody_came(server)


@pytest.mark.produces("config.none")
def test_without_a_last_good_state_nothing_is_dialled(hosts: Hosts, broken: Path) -> None:
    sidecar = hosts.sidecar(hosts.web)
    Path(sidecar.settings.mesh.last_good).unlink()
    restart(sidecar, broken)
    assert not sidecar.status().ready
    with listen(hosts.api, 8080) as server:
        out = Records(sidecar)
        assert is_reset(hosts.web, hosts.api.address, 8080)
        assert nobody_came(server)
    assert reason(out.one()).startswith("config.none by proxy")


def test_that_sockets_may_be_bound_to_any_address_makes_no_endpoint_local(hosts: Hosts) -> None:
    with hosts.web.entered():
        Path("/proc/sys/net/ipv4/ip_nonlocal_bind").write_text("1")
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.api, 8080) as server:
        converse(hosts.web.connect(API, 8080), accept(server))
    with hosts.web.entered():
        Path("/proc/sys/net/ipv4/ip_nonlocal_bind").write_text("0")
    assert out.one().tls.mode is Security.MTLS
