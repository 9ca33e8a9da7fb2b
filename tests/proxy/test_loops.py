"""Connections to the sidecar's own ports, and to addresses that are not this host's: nothing may go in circles."""

import pytest

from meshnet.codec.frames import Opened, Refused
from meshnet.model.resource import API_VERSION, AccessPolicy, AccessPolicySpec, Metadata
from meshnet.model.service import Action, Rule, Source
from tests.proxy.conftest import Hosts
from tests.proxy.peer import Peer
from tests.proxy.programs import Records, accept, is_reset, listen, nobody_came, reason

pytestmark = pytest.mark.netns

OUTBOUND, INBOUND, TUNNEL, HEALTH = 15101, 15106, 15108, 15120


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
@pytest.mark.produces("loop")
def test_a_program_that_dials_the_outbound_port_is_reset(hosts: Hosts, address: str) -> None:
    out = Records(hosts.sidecar(hosts.web))
    assert is_reset(hosts.web, address, OUTBOUND)
    assert reason(out.one()) == "loop by proxy in accept"


@pytest.mark.parametrize("family", ["address", "address6"])
def test_the_outbound_port_is_not_there_for_other_hosts(hosts: Hosts, family: str) -> None:
    with pytest.raises(ConnectionRefusedError):
        hosts.outside.connect(getattr(hosts.web, family), OUTBOUND)


@pytest.mark.parametrize("caller", ["web", "outside"])
@pytest.mark.parametrize("family", ["address", "address6"])
def test_who_dials_the_inbound_port_is_reset(hosts: Hosts, caller: str, family: str) -> None:
    into = Records(hosts.sidecar(hosts.web))
    assert is_reset(getattr(hosts, caller), getattr(hosts.web, family), INBOUND)
    assert reason(into.one()) == "loop by proxy in accept"


@pytest.mark.produces("not_redirected")
def test_where_nothing_is_redirected_a_direct_connection_is_told_so(hosts: Hosts) -> None:
    # A host of its own: with rules, conntrack would know an original destination, our own.
    bare = hosts.world.hosts.get("bare") or hosts.world.host("bare")
    sidecar = hosts.mesh.sidecars.get("bare") or hosts.mesh.sidecar(bare)
    for port in (OUTBOUND, INBOUND):
        records = Records(sidecar)
        assert is_reset(bare, "127.0.0.1", port)
        assert reason(records.one()) == "not_redirected by proxy in accept"


@pytest.mark.parametrize("port", [OUTBOUND, INBOUND, TUNNEL, HEALTH])
@pytest.mark.parametrize("family", ["address", "address6"])
def test_a_tunnel_does_not_lead_to_the_sidecar_s_own_ports(hosts: Hosts, peer: Peer, family: str, port: int) -> None:
    into = Records(hosts.sidecar(hosts.api))
    answer = peer.open(getattr(hosts.api, family), port)
    assert isinstance(answer, Refused)
    assert answer.reason == "loop"
    assert reason(into.one()) == "loop by proxy in accept"


@pytest.mark.parametrize("target", ["twin", "10.96.0.10", "fd77::99", "8.8.8.8"])
@pytest.mark.produces("not_local")
def test_a_tunnel_does_not_lead_to_other_hosts(hosts: Hosts, peer: Peer, target: str) -> None:
    into = Records(hosts.sidecar(hosts.api))
    with listen(hosts.twin, 8080) as elsewhere:
        answer = peer.open(hosts.twin.address if target == "twin" else target, 8080)
        assert isinstance(answer, Refused)
        assert answer.reason == "not_local"
        assert nobody_came(elsewhere)
    assert reason(into.one()) == "not_local by proxy in accept"


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::", "::ffff:127.0.0.1"])
def test_a_tunnel_does_not_lead_to_what_listens_for_this_host_alone(hosts: Hosts, peer: Peer, address: str) -> None:
    with listen(hosts.api, 8080) as server:
        answer = peer.open(address, 8080)
        assert isinstance(answer, Refused)
        assert answer.reason == "not_local"
        assert nobody_came(server)


def test_a_tunnel_goes_on_after_a_refusal(hosts: Hosts, peer: Peer) -> None:
    for _ in range(3):
        assert isinstance(peer.open(hosts.api.address, TUNNEL), Refused)
    with listen(hosts.api, 8080) as server:
        assert isinstance(peer.open(hosts.api.address, 8080), Opened)
        accept(server).close()


@pytest.mark.parametrize("family", ["address", "address6"])
def test_a_service_s_policy_holds_whatever_address_of_its_host_is_dialled(
    hosts: Hosts, peer: Peer, family: str
) -> None:
    rule = Rule(source=Source(principals=(hosts.mesh.identity("web"),)))
    policy = AccessPolicy(
        api_version=API_VERSION,
        metadata=Metadata(name="not-web"),
        spec=AccessPolicySpec(action=Action.DENY, services=("api",), rules=(rule,)),
    )
    hosts.write(policy)
    into = Records(hosts.sidecar(hosts.api))
    with listen(hosts.api, 8080) as server:
        answer = peer.open(getattr(hosts.api, family), 8080)
        assert isinstance(answer, Refused)
        assert (answer.reason, answer.policy) == ("authz.denied", "not-web")
        assert nobody_came(server)
    assert into.one().policy == "not-web"
