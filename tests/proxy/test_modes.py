"""What a port does with plain text and with tunnels, by its mode."""

import msgspec
import pytest

from meshnet.codec.frames import Opened, Refused
from meshnet.model.connection import Security, State
from meshnet.model.resource import API_VERSION, MeshConfig, MeshConfigSpec, Metadata, PortSpec
from meshnet.model.service import Mode
from tests.proxy.conftest import API, Hosts
from tests.proxy.peer import Peer
from tests.proxy.programs import Records, accept, converse, is_reset, listen, nobody_came, reason

pytestmark = pytest.mark.netns

FAMILIES = pytest.mark.parametrize("family", ["address", "address6"])


def set_mode(hosts: Hosts, mode: Mode) -> None:
    service = hosts.mesh.service("api", [8080], [hosts.api], addresses=[API])
    spec = msgspec.structs.replace(service.spec, ports=(PortSpec(port=8080, mode=mode),))
    hosts.write(msgspec.structs.replace(service, spec=spec))


def set_mesh_mode(hosts: Hosts, mode: Mode) -> None:
    spec = MeshConfigSpec(mode=mode)
    hosts.write(MeshConfig(api_version=API_VERSION, metadata=Metadata(name="mesh"), spec=spec))


@FAMILIES
@pytest.mark.parametrize("mode", [Mode.PERMISSIVE, Mode.DISABLE])
def test_plain_text_is_taken_and_recorded_as_such(hosts: Hosts, mode: Mode, family: str) -> None:
    set_mode(hosts, mode)
    into = Records(hosts.sidecar(hosts.api))
    with listen(hosts.api, 8080) as server:
        client = hosts.outside.connect(getattr(hosts.api, family), 8080)
        converse(client, accept(server))
    record = into.one()
    assert reason(record) == "ok by client in data"
    assert (record.tls.mode, record.source.identity) == (Security.PLAIN, "")
    assert record.destination.service == "api:8080"
    assert record.source.address.startswith(getattr(hosts.outside, family)) or family == "address6"


@FAMILIES
@pytest.mark.produces("authn.plaintext")
def test_a_strict_port_refuses_plain_text_before_the_application_hears_of_it(hosts: Hosts, family: str) -> None:
    set_mode(hosts, Mode.STRICT)
    into = Records(hosts.sidecar(hosts.api))
    with listen(hosts.api, 8080) as server:
        assert is_reset(hosts.outside, getattr(hosts.api, family), 8080, b"hello")
        assert nobody_came(server)
    record = into.one()
    assert reason(record) == "authn.plaintext by proxy in authz"
    assert record.state is State.DENIED


def test_a_strict_port_takes_tunnels(hosts: Hosts) -> None:
    set_mode(hosts, Mode.STRICT)
    with listen(hosts.api, 8080) as server:
        converse(hosts.web.connect(API, 8080), accept(server))


@pytest.mark.produces("authn.disabled")
def test_a_port_with_the_mesh_disabled_refuses_tunnels(hosts: Hosts, peer: Peer) -> None:
    set_mode(hosts, Mode.DISABLE)
    into = Records(hosts.sidecar(hosts.api))
    with listen(hosts.api, 8080) as server:
        answer = peer.open(hosts.api.address, 8080)
        assert isinstance(answer, Refused)
        assert answer.reason == "authn.disabled"
        assert nobody_came(server)
    assert into.one().state is State.DENIED


def test_a_caller_hears_from_its_own_sidecar_why_it_was_refused(hosts: Hosts) -> None:
    set_mode(hosts, Mode.DISABLE)
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.api, 8080) as server:
        assert is_reset(hosts.web, API, 8080)
        assert nobody_came(server)
    assert reason(out.one()) == "authn.disabled by policy in connect"
    assert len(out.one().attempts) == 1


def test_a_port_of_no_service_has_the_mode_of_the_mesh(hosts: Hosts, peer: Peer) -> None:
    set_mesh_mode(hosts, Mode.STRICT)
    with listen(hosts.api, 5555) as server:
        assert is_reset(hosts.outside, hosts.api.address, 5555)
        assert isinstance(peer.open(hosts.api.address, 5555), Opened)
        accept(server).close()
        assert nobody_came(server)


def test_a_port_s_own_mode_wins_over_that_of_the_mesh(hosts: Hosts) -> None:
    config = MeshConfig(api_version=API_VERSION, metadata=Metadata(name="mesh"), spec=MeshConfigSpec(mode=Mode.STRICT))
    service = hosts.mesh.service("api", [8080], [hosts.api], addresses=[API])
    spec = msgspec.structs.replace(service.spec, ports=(PortSpec(port=8080, mode=Mode.PERMISSIVE),))
    hosts.write(config, msgspec.structs.replace(service, spec=spec))
    with listen(hosts.api, 8080) as server:
        converse(hosts.outside.connect(hosts.api.address, 8080), accept(server))
