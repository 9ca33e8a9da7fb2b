"""Resources and certificates change while connections are open: those live on, and new ones see the new state."""

import os
import signal

import pytest

from meshnet.control.authority import save_issued
from meshnet.model.resource import API_VERSION, AccessPolicy, AccessPolicySpec, Metadata
from meshnet.model.service import Action, Rule, Source
from tests.proxy.conftest import API, Hosts
from tests.proxy.metrics import value
from tests.proxy.peer import issue
from tests.proxy.programs import Records, accept, converse, is_reset, listen, nobody_came, reason
from tests.world import wait_for

pytestmark = pytest.mark.netns


def policy(name: str, principal: str, *, action: Action = Action.DENY) -> AccessPolicy:
    rule = Rule(source=Source(principals=(principal,)))
    return AccessPolicy(
        api_version=API_VERSION,
        metadata=Metadata(name=name),
        spec=AccessPolicySpec(action=action, services=("api",), rules=(rule,)),
    )


def test_an_open_connection_outlives_the_removal_of_its_endpoint_and_new_ones_go_to_the_new_one(hosts: Hosts) -> None:
    with listen(hosts.api, 8080) as old, listen(hosts.twin, 8080) as new:
        client, app = hosts.web.connect(API, 8080), accept(old)
        hosts.write(hosts.mesh.service("api", [8080], [hosts.twin], addresses=[API]))
        converse(hosts.web.connect(API, 8080), accept(new))
        converse(client, app)
        assert nobody_came(old)


def test_an_open_connection_outlives_the_removal_of_its_service(hosts: Hosts) -> None:
    with listen(hosts.api, 8080) as server:
        client, app = hosts.web.connect(API, 8080), accept(server)
        hosts.write(hosts.mesh.service("api", [8081], [hosts.api], addresses=["10.96.0.99"]))
        converse(client, app)


def test_a_policy_that_denies_somebody_else_leaves_the_connection_open(hosts: Hosts) -> None:
    with listen(hosts.api, 8080) as server:
        client, app = hosts.web.connect(API, 8080), accept(server)
        hosts.write(policy("not-twin", hosts.mesh.identity("twin")))
        converse(client, app)


@pytest.mark.produces("authz.revoked")
def test_a_policy_that_denies_the_caller_ends_its_open_connections_with_the_policy_s_name(hosts: Hosts) -> None:
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(hosts.api))
    with listen(hosts.api, 8080) as server:
        client, app = hosts.web.connect(API, 8080), accept(server)
        into.open()
        hosts.write(policy("not-web", hosts.mesh.identity("web")))
        for sock in (client, app):
            with sock, pytest.raises(ConnectionResetError):
                sock.recv(1)
    assert (reason(into.one()), into.one().policy) == ("authz.revoked by policy in data", "not-web")
    assert reason(out.one()) == "authz.revoked by peer-proxy in data"


@pytest.mark.produces("authz.denied")
def test_a_caller_that_is_denied_hears_which_policy_it_was(hosts: Hosts) -> None:
    hosts.write(policy("not-web", hosts.mesh.identity("web")))
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(hosts.api))
    with listen(hosts.api, 8080) as server:
        assert is_reset(hosts.web, API, 8080)
        assert nobody_came(server)
    for record in (out.one(), into.one()):
        assert reason(record).startswith("authz.denied by policy in ")
        assert record.policy == "not-web"


def test_a_caller_that_is_allowed_has_the_policy_on_record(hosts: Hosts) -> None:
    hosts.write(policy("only-web", hosts.mesh.identity("web"), action=Action.ALLOW))
    into = Records(hosts.sidecar(hosts.api))
    with listen(hosts.api, 8080) as server:
        converse(hosts.web.connect(API, 8080), accept(server))
        assert is_reset(hosts.outside, hosts.api.address, 8080)
        assert is_reset(hosts.twin, API, 8080)
    allowed, plain, other = into.ended(3)
    assert allowed.policy == "only-web"
    assert reason(plain) == reason(other) == "authz.denied by policy in authz"


def test_a_service_with_two_ports_counts_as_one(hosts: Hosts) -> None:
    sidecar = hosts.sidecar(hosts.web)
    hosts.write()
    before = sidecar.status().config.services
    hosts.write(hosts.mesh.service("two-ports", [6001, 6002], [hosts.api], addresses=["10.96.0.98"]))
    assert sidecar.status().config.services == before + 1


BROKEN = """\
apiVersion: meshnet.dev/v1
kind: Service
metadata:
  name: broken
spec:
  adresses: [10.96.0.99]
  ports: [{port: 80}]
"""


def test_a_broken_file_is_refused_by_line_and_the_last_good_state_stays_until_it_is_mended(hosts: Hosts) -> None:
    sidecar = hosts.sidecar(hosts.web)
    version, refusals = sidecar.status().config.version, value(hosts.web, "meshnet_config_nacks_total")
    file = hosts.mesh.directory / "broken.yaml"
    with listen(hosts.api, 8080) as server:
        client, app = hosts.web.connect(API, 8080), accept(server)
        try:
            file.write_text(BROKEN)
            problem = wait_for(lambda: sidecar.status().config.problem)
            for place in (problem, hosts.log(hosts.web)):
                assert "broken.yaml:6: " in place
                assert 'did you mean "addresses"?' in place
            assert value(hosts.web, "meshnet_config_nacks_total") == refusals + 1
            status = sidecar.status()
            assert (status.config.version, status.ready) == (version, True)
            # Who sends SIGHUP asks to hear it again.
            os.kill(status.pid, signal.SIGHUP)
            wait_for(lambda: value(hosts.web, "meshnet_config_nacks_total") == refusals + 2)
            converse(client, app)
            converse(hosts.web.connect(API, 8080), accept(server))

            file.write_text(BROKEN.replace("adresses", "addresses"))
            wait_for(lambda: not sidecar.status().config.problem)
            assert sidecar.status().config.version > version
            assert sidecar.status().config.services == len(hosts.resources) + 1
            converse(hosts.web.connect(API, 8080), accept(server))
        finally:
            file.unlink()


def test_a_renewed_certificate_is_taken_up_and_the_open_connection_lives_on(hosts: Hosts) -> None:
    sidecars = [hosts.sidecar(host) for host in (hosts.web, hosts.api)]
    serials = [sidecar.status().certificate.serial for sidecar in sidecars]
    assert serial_seen(hosts) == serials[1]
    out = Records(sidecars[0])
    made = "meshnet_tls_handshake_seconds_count"
    with listen(hosts.api, 8080) as server:
        converse(hosts.web.connect(API, 8080), accept(server))
        client, app = hosts.web.connect(API, 8080), accept(server)
        before = value(hosts.web, made)
        for sidecar in sidecars:
            save_issued(issue(hosts.mesh, sidecar.host.name), sidecar.config.parent)
        wait_for(lambda: not set(serials) & {sidecar.status().certificate.serial for sidecar in sidecars})
        assert serial_seen(hosts) == sidecars[1].status().certificate.serial
        # A new connection has a new tunnel, made for it or ahead of it, with no session of the old certificate.
        converse(hosts.web.connect(API, 8080), accept(server))
        converse(client, app)
        out.ended(3)
        converse(hosts.web.connect(API, 8080), accept(server))
    _, _, renewed, last = out.ended(4)
    assert value(hosts.web, made) > before
    assert renewed.tls.resumed is False
    assert last.tls.handshake_ms is None
    assert value(hosts.web, "meshnet_cert_renewals_total") == 1


def test_a_certificate_that_does_not_fit_its_key_is_not_taken_and_said_so(hosts: Hosts) -> None:
    sidecar = hosts.sidecar(hosts.twin)
    home, serial = sidecar.config.parent, sidecar.status().certificate.serial
    kept = (home / "cert.pem").read_bytes()
    (home / "cert.pem").write_bytes(issue(hosts.mesh, "twin").certificate)
    problem = wait_for(lambda: sidecar.status().certificate.problem)
    assert "key values mismatch" in problem.lower().replace("_", " ")
    assert sidecar.status().certificate.serial == serial
    (home / "cert.pem").write_bytes(kept)


def serial_seen(hosts: Hosts) -> str:
    """The serial of the certificate that `api` shows, in hexadecimal."""
    arguments = ("-connect", f"{hosts.api.address}:15108", "-alpn", "meshnet/1", "-showcerts")
    shown = hosts.outside.run("openssl", "s_client", *arguments, check=False).stdout
    printed = hosts.outside.run("openssl", "x509", "-noout", "-serial", stdin=shown).stdout
    return printed.strip().removeprefix("serial=").lower().lstrip("0")
