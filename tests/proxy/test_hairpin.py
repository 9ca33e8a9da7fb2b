"""A service whose endpoint is the caller's own host: handed to the inbound side in process, with its policy."""

import socket

import msgspec
import pytest

from meshnet.model.connection import Direction, Security, State
from meshnet.model.resource import API_VERSION, AccessPolicy, AccessPolicySpec, Metadata, PortSpec
from meshnet.model.service import Action, Mode, Rule, Source
from tests.proxy.conftest import SELF, Hosts
from tests.proxy.programs import Records, accept, converse, is_reset, listen, nobody_came, read, reason

pytestmark = pytest.mark.netns


def test_a_service_on_the_caller_s_own_host_is_reached_without_a_tunnel_istio23369(hosts: Hosts) -> None:
    out = Records(hosts.sidecar(hosts.web))
    tunnels = hosts.sidecar(hosts.web).status().tunnels
    with listen(hosts.web, 9000) as server:
        converse(hosts.web.connect(SELF, 9000), accept(server), b"q" * 5000, b"a" * 7000)
    record = out.one()
    assert reason(record) == "ok by client in data"
    assert record.direction is Direction.OUTBOUND
    assert record.tls.mode is Security.PLAIN
    assert record.endpoint == f"{hosts.web.address}:9000"
    assert record.source.identity == record.destination.identity == hosts.mesh.identity("web")
    assert (record.bytes_sent, record.bytes_received) == (5000, 7000)
    assert record.policy == "default-allow"
    assert hosts.sidecar(hosts.web).status().tunnels == tunnels


def test_what_the_client_says_before_the_application_accepts_arrives_once(hosts: Hosts) -> None:
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.web, 9000) as server:
        for number in range(20):
            said = b"hello %d" % number
            with hosts.web.connect(SELF, 9000) as client:
                client.sendall(said)
                client.shutdown(socket.SHUT_WR)
                with accept(server) as app:
                    assert read(app, len(said)) == said
                    assert app.recv(1) == b""
    assert {record.bytes_sent for record in out.ended(20)} <= {7, 8}


@pytest.mark.parametrize("mode", list(Mode))
def test_a_host_may_call_itself_whatever_the_mode_of_the_port(hosts: Hosts, mode: Mode) -> None:
    service = hosts.mesh.service("self", [9000], [hosts.web], addresses=[SELF])
    spec = msgspec.structs.replace(service.spec, ports=(PortSpec(port=9000, mode=mode),))
    hosts.write(msgspec.structs.replace(service, spec=spec))
    with listen(hosts.web, 9000) as server:
        converse(hosts.web.connect(SELF, 9000), accept(server))


def test_an_access_policy_that_denies_holds_here_too(hosts: Hosts) -> None:
    rule = Rule(source=Source(principals=(hosts.mesh.identity("web"),)))
    policy = AccessPolicy(
        api_version=API_VERSION,
        metadata=Metadata(name="not-even-itself"),
        spec=AccessPolicySpec(action=Action.DENY, services=("self",), rules=(rule,)),
    )
    hosts.write(policy)
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.web, 9000) as server:
        assert is_reset(hosts.web, SELF, 9000)
        assert nobody_came(server)
    record = out.one()
    assert reason(record) == "authz.denied by policy in authz"
    assert record.state is State.DENIED
    assert record.policy == "not-even-itself"


def test_a_denial_that_comes_later_ends_the_open_connection(hosts: Hosts) -> None:
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.web, 9000) as server, hosts.web.connect(SELF, 9000) as client, accept(server) as app:
        out.open()
        policy = AccessPolicy(
            api_version=API_VERSION,
            metadata=Metadata(name="no-more"),
            spec=AccessPolicySpec(
                action=Action.DENY, services=("self",), rules=(Rule(source=Source(ip_blocks=("0.0.0.0/0",))),)
            ),
        )
        hosts.write(policy)
        for sock in (client, app):
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
    assert reason(out.one()) == "authz.revoked by policy in data"
    assert out.one().policy == "no-more"
