"""`meshnet explain` of connections that there are not yet: where they would go, and whether they would be let in."""

import json
import re

import pytest

from tests.proxy.conftest import API, Hosts
from tests.proxy.programs import Records, accept, converse, listen
from tests.proxy.test_config import policy
from tests.world import ProgramFailed

pytestmark = pytest.mark.netns


def test_a_service_is_named_as_the_tables_name_it(hosts: Hosts) -> None:
    web = hosts.sidecar(hosts.web)
    by_name, by_address = (web.meshnet("explain", target) for target in ("api:8080", f"{API}:8080"))
    assert f"-> {API}:8080  outbound  captured" in by_name
    assert "route       api:8080, least_conn among 1 endpoints" in by_name
    assert "whether it is let in there: meshnet ping api:8080" in by_name
    assert by_name.replace("ping api:8080", f"ping {API}:8080").splitlines() == by_address.splitlines()


def test_who_would_be_let_in_is_told_of_each_identity_that_the_mesh_has_there(hosts: Hosts) -> None:
    web, identity = hosts.web.address, hosts.mesh.identity("web")
    api = hosts.sidecar(hosts.api)
    hosts.write(policy("not-web", identity))
    said = api.meshnet("explain", web, f"{hosts.api.address}:8080")
    assert "inbound  captured" in said
    assert "service     api:8080, mode permissive" in said
    assert "callers     in plain text: let in by default-allow" in said
    assert f"            {identity}: refused, authz.denied: {identity} may not call port 8080: not-web" in said
    assert "what to do  authz.denied: meshnet explain authz.denied" in said

    told = json.loads(api.meshnet("explain", web, f"{hosts.api.address}:8080", "-o", "json"))["admission"]
    assert [(each["identity"], each["allowed"], each["policy"]) for each in told["callers"]] == [
        ("", True, "default-allow"),
        (identity, False, "not-web"),
    ]
    own = api.meshnet("explain", web, f"{hosts.api.address}:15108")  # never captured, and asked all the same
    assert "left alone" in own


def test_a_connection_is_told_with_the_rule_that_captures_it(hosts: Hosts) -> None:
    web, api = hosts.sidecar(hosts.web), hosts.sidecar(hosts.api)
    out, into = Records(web), Records(api)
    with listen(hosts.api, 8080) as server:
        converse(hosts.web.connect(API, 8080), accept(server))
        converse(hosts.outside.connect(hosts.api.address, 8080), accept(server))
    by_tunnel, plain = into.ended(2)
    assert "of MESHNET_OUT (to the outbound proxy): " in web.meshnet("explain", out.one().id)
    assert "of MESHNET_IN (to the inbound proxy): " in api.meshnet("explain", plain.id)
    assert "\nrule " not in api.meshnet("explain", by_tunnel.id)  # it came to the sidecar's own port
    told = json.loads(api.meshnet("explain", plain.id, "-o", "json"))
    assert (told["rule"]["chain"], told["rule"]["action"]) == ("MESHNET_IN", "redirect to :15106")
    limited = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
    unread = hosts.web.run(*limited, "meshnet", "explain", "--socket", web.settings.admin.socket, out.one().id)
    assert "\nrule " not in unread.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("ping", API), f"name its port too: {API}:8080"),
        (("ping", "api"), "name its port too: api:8080"),
        (("explain", API), f"{API} is an address without a port"),
        (("explain", "nobody:1"), "'nobody' is no address"),
    ],
)
def test_what_names_nothing_is_told_with_what_could_be_meant(hosts: Hosts, words: tuple[str, str], said: str) -> None:
    with pytest.raises(ProgramFailed, match=re.escape(said)):
        hosts.sidecar(hosts.web).meshnet(*words)
