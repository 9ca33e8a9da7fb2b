"""Who may call: judged before the application is dialled, and again for what is open when a policy changes."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from meshnet.model.connection import Connection, Security, State
from tests.proxy.programs import Records, ended_by_rst, reason
from tests.traffic.app import App
from tests.traffic.calls import Call, is_reset, who
from tests.traffic.conftest import Hosts, Name, access
from tests.world import Host, wait_for

pytestmark = pytest.mark.netns


class Judged:
    """The records of one denied call, from both sidecars, and in their access logs."""

    def __init__(self, hosts: Hosts, caller: Host, api: Host) -> None:
        self._hosts = hosts
        self._caller, self._api = caller, api
        self._out, self._into = Records(hosts.sidecar(caller)), Records(hosts.sidecar(api))

    def both(self) -> list[Connection]:
        there, here = self._out.one(), self._into.one()
        assert there.id == here.id
        assert there.tls.peer_identity == self._hosts.mesh.identity(self._api.name)
        for host, record in ((self._caller, there), (self._api, here)):
            assert record.state is State.DENIED
            assert record.source.identity == self._hosts.mesh.identity(self._caller.name)
            # Who said no is proven: the tunnel was up.
            assert record.tls.mode is Security.MTLS
            assert record.tls.version == "TLSv1.3"
            assert record.destination.identity == self._hosts.mesh.identity(self._api.name)
            line = self._hosts.logged(host, record.id)
            assert (line.reason, line.policy) == (record.reason, record.policy)
        return [there, here]


@contextmanager
def never_reached(hosts: Hosts, port: int) -> Iterator[None]:
    """The application at api-1 gets no connection in the block."""
    with App(hosts.apis[0], port) as app:
        yield
        with Call(hosts.apis[0], "127.0.0.1", port):  # whatever came before this one has been counted
            assert app.accepted == 1


def test_a_denied_principal_is_reset_and_the_application_never_sees_it(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    cron = {"principals": [hosts.mesh.identity("cron")]}
    hosts.write(hosts.service(name, [api]), access("cron-stays-out", "DENY", name, source=cron))
    judged = Judged(hosts, hosts.cron, api)
    with never_reached(hosts, name.port):
        assert is_reset(hosts.cron, name)
    for record in judged.both():
        assert reason(record) == "authz.denied by policy in " + (
            "connect" if record.direction == "outbound" else "authz"
        )
        assert record.policy == "cron-stays-out"
        assert (record.bytes_sent, record.bytes_received) == (0, 0)
    with hosts.apps(name.port, [api]):
        assert who(hosts.web, name) == "api-1"


def test_an_allow_shuts_out_everybody_else(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    web = {"principals": [hosts.mesh.identity("web")]}
    hosts.write(hosts.service(name, [api]), access("web-only", "ALLOW", name, source=web))
    judged = Judged(hosts, hosts.cron, api)
    with never_reached(hosts, name.port):
        assert is_reset(hosts.cron, name)
        assert {record.policy for record in judged.both()} == {"no ALLOW policy matched"}
        assert is_reset(hosts.outside, api.address, name.port)
    into = Records(hosts.sidecar(api))
    with hosts.apps(name.port, [api]):
        assert who(hosts.web, name) == "api-1"
    assert into.one().policy == "web-only"


def test_a_deny_beats_an_allow(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    web = {"principals": [hosts.mesh.identity("web")]}
    hosts.write(
        hosts.service(name, [api]),
        access("everybody", "ALLOW", name, source={"principals": ["*"]}),
        access("not-web", "DENY", name, source=web),
    )
    judged = Judged(hosts, hosts.web, api)
    with never_reached(hosts, name.port):
        assert is_reset(hosts.web, name)
    assert {record.policy for record in judged.both()} == {"not-web"}
    with hosts.apps(name.port, [api]):
        assert who(hosts.cron, name) == "api-1"


def test_a_port_can_be_denied_and_its_neighbour_not(hosts: Hosts, name: Name) -> None:
    api, other = hosts.apis[0], hosts.new_name()
    hosts.write(
        hosts.service(name, [api]),
        hosts.service(other, [api]),
        access("that-port", "DENY", target={"ports": [name.port]}),  # no services: every port of every host
    )
    judged = Judged(hosts, hosts.web, api)
    with never_reached(hosts, name.port):
        assert is_reset(hosts.web, name)
    assert {record.policy for record in judged.both()} == {"that-port"}
    with hosts.apps(other.port, [api]):
        assert who(hosts.web, other) == "api-1"


@pytest.mark.parametrize("family", ["address", "address6"])
def test_a_network_can_be_denied_to_callers_with_and_without_a_sidecar(hosts: Hosts, name: Name, family: str) -> None:
    api = hosts.apis[0]
    blocks = [getattr(hosts.cron, family), getattr(hosts.outside, family)]
    hosts.write(hosts.service(name, [api]), access("that-network", "DENY", name, source={"ipBlocks": blocks}))
    with never_reached(hosts, name.port):
        assert is_reset(hosts.outside, getattr(api, family), name.port)
        if family == "address":  # tunnels go to the endpoint's IPv4 address, and that is where a caller is seen
            judged = Judged(hosts, hosts.cron, api)
            assert is_reset(hosts.cron, name)
            assert {record.policy for record in judged.both()} == {"that-network"}
    with hosts.apps(name.port, [api]):
        assert who(hosts.web, name) == "api-1"


def test_not_principals_means_everybody_else_and_those_without_identity(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    source = {"notPrincipals": [hosts.mesh.identity("web")]}
    hosts.write(hosts.service(name, [api]), access("but-web", "DENY", name, source=source))
    judged = Judged(hosts, hosts.cron, api)
    with never_reached(hosts, name.port):
        assert is_reset(hosts.cron, name)
        assert {record.policy for record in judged.both()} == {"but-web"}
        assert is_reset(hosts.outside, api.address, name.port)
    with hosts.apps(name.port, [api]):
        assert who(hosts.web, name) == "api-1"


def test_a_caller_in_plain_text_has_no_identity_at_all(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(name, [api]), access("anybody", "ALLOW", name, source={"principals": ["*"]}))
    into = Records(hosts.sidecar(api))
    with never_reached(hosts, name.port):
        assert is_reset(hosts.outside, api.address, name.port)
    record = into.one()
    assert reason(record) == "authz.denied by policy in authz"
    assert record.policy == "no ALLOW policy matched"
    assert (record.source.identity, record.source.address.rpartition(":")[0]) == ("", hosts.outside.address)
    assert hosts.logged(api, record.id).reason == record.reason


def test_a_new_deny_cuts_what_it_denies_and_nothing_else(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    service = hosts.service(name, [api])
    hosts.write(service)
    out, into = Records(hosts.sidecar(hosts.cron)), Records(hosts.sidecar(api))
    with hosts.apps(name.port, [api]) as apps, Call(hosts.cron, name) as cron, Call(hosts.web, name) as web:
        source = {"principals": [hosts.mesh.identity("cron")]}
        hosts.write(service, access("cron-is-out", "DENY", name, source=source))
        assert ended_by_rst(cron.socket)
        assert web.say("still here") == "still here"

        there = out.one()
        here = wait_for(lambda: [record for record in into.now() if record.id == there.id and record.reason])[0]
        assert reason(there) == "authz.revoked by peer-proxy in data"
        assert reason(here) == "authz.revoked by policy in data"
        assert here.policy == "cron-is-out"
        for host, record in ((hosts.cron, there), (api, here)):
            assert record.state is State.DENIED
            assert (record.bytes_sent, record.bytes_received) == (0, len("api-1\n"))
            assert hosts.logged(host, record.id).reason == record.reason
        assert is_reset(hosts.cron, name)
        assert apps["api-1"].accepted == 2


def test_a_live_caller_in_plain_text_is_cut_too(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    service = hosts.service(name, [api])
    hosts.write(service)
    into = Records(hosts.sidecar(api))
    with hosts.apps(name.port, [api]), Call(hosts.outside, api.address, name.port) as call:
        assert into.open()[0].tls.mode is Security.PLAIN
        hosts.write(service, access("with-identity", "ALLOW", name, source={"principals": ["*"]}))
        assert ended_by_rst(call.socket)
    record = into.one()
    assert reason(record) == "authz.revoked by policy in data"
    assert record.policy == "no ALLOW policy matched"
