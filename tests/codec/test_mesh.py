import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshnet.codec.mesh import build_snapshot, read_mesh
from meshnet.codec.resources import parse_resources
from meshnet.errors import ConfigError
from meshnet.model.address import Address
from meshnet.model.service import (
    AccessPolicy,
    Action,
    Balance,
    BreakerSettings,
    CheckSettings,
    ConnectSettings,
    Endpoint,
    Limits,
    Mode,
    Rule,
    Source,
    Target,
    Traffic,
    TunnelKind,
)
from meshnet.model.snapshot import Snapshot

WEB_ID = "spiffe://prod/ns/default/sa/web"
WEB = """\
apiVersion: meshnet.dev/v1
kind: Service
metadata:
  name: web
spec:
  addresses: [10.0.0.1, "::FFFF:10.0.0.2"]
  ports:
    - port: 80
      targetPort: 8080
    - port: 443
      mode: strict
  endpoints:
    - address: 10.1.0.1
      tunnel: meshnet
      identity: spiffe://prod/ns/default/sa/web
      weight: 2
    - address: "FD00:0::1"
"""
DB = """\
apiVersion: meshnet.dev/v1
kind: Service
metadata: {name: db, namespace: data}
spec:
  addresses: [10.0.0.9]
  ports: [{port: 5432}]
  endpoints:
    - address: 10.1.0.9
"""
TRAFFIC = """\
apiVersion: meshnet.dev/v1
kind: TrafficPolicy
metadata: {name: careful}
spec:
  services: [web, data/db]
  balance: round_robin
  limits: {maxConnections: 10, queueTimeout: 250ms}
  breaker: {failures: 2, maxOpenTime: 2m, jitter: 0.1}
  connect: {attempts: 1, totalTimeout: 1s}
"""
ACCESS = """\
apiVersion: meshnet.dev/v1
kind: AccessPolicy
metadata: {name: readers, namespace: data}
spec:
  action: ALLOW
  services: [db]
  rules:
    - from:
        principals: [spiffe://prod/ns/default/*, "*/sa/job", spiffe://prod/ns/x/sa/y, "*"]
        notPrincipals: [spiffe://prod/ns/default/sa/old*]
        ipBlocks: [10.0.0.0/8, 192.168.0.1]
      to:
        ports: [5432]
"""
CONFIG = """\
apiVersion: meshnet.dev/v1
kind: MeshConfig
metadata: {name: mesh}
spec:
  trustDomain: prod
  mode: disable
  defaultAction: DENY
"""


def mesh(*texts: str) -> Snapshot:
    """Files called a.yaml, b.yaml and so on."""
    return read_mesh([(f"{chr(ord('a') + number)}.yaml", text) for number, text in enumerate(texts)], 7)


def refusal(*texts: str) -> str:
    with pytest.raises(ConfigError) as caught:
        mesh(*texts)
    return str(caught.value)


def test_a_service_becomes_its_ports_with_all_of_its_endpoints() -> None:
    snapshot = mesh(WEB)
    assert snapshot.version == 7
    http, https = snapshot.services
    assert (http.name, http.mode, https.name, https.mode) == ("web:80", Mode.PERMISSIVE, "web:443", Mode.STRICT)
    meshed = Endpoint(address=Address("10.1.0.1", 8080), tunnel=TunnelKind.MESHNET, identity=WEB_ID, weight=2)
    assert http.endpoints == (meshed, Endpoint(address=Address("fd00::1", 8080)))
    assert [endpoint.address.port for endpoint in https.endpoints] == [443, 443]
    assert http.traffic == Traffic()
    assert snapshot.by_address == {
        Address("10.0.0.1", 80): http,
        Address("10.0.0.1", 443): https,
        Address("10.0.0.2", 80): http,
        Address("10.0.0.2", 443): https,
    }
    assert snapshot.by_endpoint[Address("10.1.0.1", 8080)] == (http, meshed)
    assert len(snapshot.by_endpoint) == 4


def test_a_traffic_policy_changes_what_it_names_and_leaves_the_other_defaults() -> None:
    snapshot = mesh(WEB, DB, TRAFFIC)
    traffic = Traffic(
        balance=Balance.ROUND_ROBIN,
        limits=Limits(max_connections=10, queue_timeout=0.25),
        breaker=BreakerSettings(failures=2, max_open_time=120.0, jitter=0.1),
        connect=ConnectSettings(attempts=1, total_timeout=1.0),
    )
    assert [service.traffic for service in snapshot.services] == [traffic] * 3
    assert mesh(WEB, DB).services[0].traffic == Traffic()


def test_an_access_policy_comes_out_with_full_names_and_canonical_networks() -> None:
    principals = ("spiffe://prod/ns/default/*", "*/sa/job", "spiffe://prod/ns/x/sa/y", "*")
    source = Source(
        principals=principals,
        not_principals=("spiffe://prod/ns/default/sa/old*",),
        ip_blocks=("10.0.0.0/8", "192.168.0.1/32"),
    )
    rule = Rule(source=source, target=Target(ports=(5432,)))
    assert mesh(DB, ACCESS).policies == (
        AccessPolicy(name="data/readers", action=Action.ALLOW, services=("data/db",), rules=(rule,)),
    )
    everywhere = mesh(ACCESS.replace(", namespace: data", "").replace("  services: [db]\n", ""))
    assert (everywhere.policies[0].name, everywhere.policies[0].services) == ("readers", ())


def test_the_mesh_config_sets_what_holds_where_nothing_else_is_said() -> None:
    snapshot = mesh(CONFIG, WEB)
    assert (snapshot.trust_domain, snapshot.mode, snapshot.default_action) == ("prod", Mode.DISABLE, Action.DENY)
    assert [service.mode for service in snapshot.services] == [Mode.DISABLE, Mode.STRICT]
    bare = mesh(WEB)
    assert (bare.trust_domain, bare.mode, bare.default_action) == ("", Mode.PERMISSIVE, Action.ALLOW)


def test_an_endpoint_of_two_services_belongs_to_the_first_by_name() -> None:
    other = DB.replace("name: db, namespace: data", "name: db2, namespace: data").replace("10.0.0.9", "10.0.0.8")
    for texts in ((DB, other), (other, DB)):
        service, _ = mesh(*texts).by_endpoint[Address("10.1.0.9", 5432)]
        assert service.name == "data/db:5432"


def test_the_same_endpoint_twice_is_one() -> None:
    assert len(mesh(DB + '    - address: "::ffff:10.1.0.9"\n').services[0].endpoints) == 1


def test_a_weight_of_zero_keeps_a_drained_endpoint_known() -> None:
    (endpoint,) = mesh(DB + "      weight: 0\n").services[0].endpoints
    assert endpoint.weight == 0


CHECKED = """\
apiVersion: meshnet.dev/v1
kind: TrafficPolicy
metadata: {name: checked}
spec: {services: [data/db]%s}
"""


def test_there_are_checks_only_where_they_are_asked_for_be_it_without_a_word() -> None:
    assert mesh(DB, CHECKED % "").services[0].traffic.check is None
    assert mesh(DB, CHECKED % ", check: {}").services[0].traffic.check == CheckSettings()
    given = ', check: {interval: 2s, timeout: 300ms, rise: 1, fall: 9, send: "a\\r\\n", expect: b}'
    assert mesh(DB, CHECKED % given).services[0].traffic.check == CheckSettings(
        interval=2.0, timeout=0.3, rise=1, fall=9, send="a\r\n", expect="b"
    )


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("interval: 50ms", "spec.check.interval: shorter than 100ms"),
        ("timeout: 11s", "spec.check.timeout: longer than 10s"),
        ("fall: 0", "spec.check.fall: 0 is not between 1 and 2147483647"),
        ('send: ""', 'spec.check.send: "" is not 1 to 256 bytes'),
        (f"expect: {'x' * 257}", "is not 1 to 256 bytes"),
    ],
)
def test_a_check_that_cannot_be_is_refused(field: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        mesh(DB, CHECKED % f", check: {{{field}}}")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: web", "name: Web", 'b.yaml:4: Service Web, metadata.name: "Web" is not a name: '
         "use a-z, 0-9, - and ., at most 253 of them"),
        ("10.0.0.1,", "10.0.0.300,", 'b.yaml:6: Service web, spec.addresses[0]: "10.0.0.300" is not an IP address'),
        ("10.0.0.1,", "0.0.0.0,", 'b.yaml:6: Service web, spec.addresses[0]: "0.0.0.0" is not an address of one host'),
        ("10.0.0.1,", "10.0.0.9,", None),
        ("port: 80\n", "port: 0\n", "b.yaml:8: Service web, spec.ports[0].port: 0 is not between 1 and 65535"),
        ("8080", "80800", "b.yaml:9: Service web, spec.ports[0].targetPort: 80800 is not between 1 and 65535"),
        ("port: 443", "port: 80", "b.yaml:10: Service web, spec.ports[1].port: the port 80 is given twice"),
        ("address: 10.1.0.1\n", "address: 10.1.0.1:8080\n", "b.yaml:13: Service web, spec.endpoints[0].address: "
         '"10.1.0.1:8080" is not an IP address (write "10.1.0.1": ports are given apart)'),
        ("address: 10.1.0.1\n", "address: web_1!\n", "b.yaml:13: Service web, spec.endpoints[0].address: "
         '"web_1!" is neither an IP address nor a DNS name'),
        ("address: 10.1.0.1\n", "address: 10.1.0.300\n", "b.yaml:13: Service web, spec.endpoints[0].address: "
         '"10.1.0.300" is neither an IP address nor a DNS name'),
        ("address: 10.1.0.1\n", "address: web-1.example.com:80\n", "b.yaml:13: Service web, spec.endpoints[0].address: "
         '"web-1.example.com:80" is neither an IP address nor a DNS name (write "web-1.example.com": '
         "ports are given apart)"),
        ("address: 10.1.0.1\n", "address: Web-1.example.com.\n", None),
        ("      identity: spiffe://prod/ns/default/sa/web\n", "", "b.yaml:13: Service web, spec.endpoints[0]: "
         "a meshed endpoint needs an identity (add identity: spiffe://...)"),
        ("      tunnel: meshnet\n", "", "b.yaml:14: Service web, spec.endpoints[0].identity: "
         "a plain endpoint proves no identity (add tunnel: meshnet, or remove the identity)"),
        ("spiffe://prod", "prod", "b.yaml:15: Service web, spec.endpoints[0].identity: "
         '"prod/ns/default/sa/web" is not a SPIFFE id such as spiffe://prod/ns/default/sa/web '
         '(did you mean "spiffe://prod/ns/default/sa/web"?)'),
        ("weight: 2", "weight: -1", "b.yaml:16: Service web, spec.endpoints[0].weight: "
         "-1 is not between 0 and 1000000"),
        ("weight: 2", "tunnelPort: 0", "b.yaml:16: Service web, spec.endpoints[0].tunnelPort: "
         "0 is not between 1 and 65535"),
        ('"FD00:0::1"', "10.1.0.1", 'b.yaml:17: Service web, spec.endpoints[1]: the endpoint "10.1.0.1" '
         "is given twice, and not the same"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_service_is_named_with_its_very_line(old: str, new: str, message: str | None) -> None:
    assert WEB.count(old) == 1
    if message is None:
        mesh(DB, WEB.replace(old, new))  # the address of another service, at another port
    else:
        assert refusal(DB, WEB.replace(old, new)) == message


def test_a_service_without_ports_is_refused() -> None:
    text = DB.replace("[{port: 5432}]", "[]")
    assert refusal(text) == "a.yaml:6: Service data/db, spec.ports: a service has at least one port"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[web,", "[wbe,", "c.yaml:5: TrafficPolicy careful, spec.services[0]: there is no service "
         '"wbe" in namespace default (did you mean "web"?)'),
        ("data/db", "db", "c.yaml:5: TrafficPolicy careful, spec.services[1]: there is no service "
         '"db" in namespace default (did you mean "data/db"?)'),
        ("data/db", "dta/db", "c.yaml:5: TrafficPolicy careful, spec.services[1]: there is no service "
         '"dta/db" (did you mean "data/db"?)'),
        ("[web, data/db]", "[]", "c.yaml:5: TrafficPolicy careful, spec.services: "
         "a traffic policy names at least one service"),
        ("maxConnections: 10", "maxConnections: -1", "c.yaml:7: TrafficPolicy careful, spec.limits.maxConnections: "
         "-1 is not between 0 and 2147483647"),
        ("250ms", "250", "c.yaml:7: TrafficPolicy careful, spec.limits.queueTimeout: expected text, got 250 "
         "(write it in quotes)"),
        ("250ms", '"250"', 'c.yaml:7: TrafficPolicy careful, spec.limits.queueTimeout: "250" is not a duration '
         'such as 250ms, 3s, 5m or 1h30m (write "250s")'),
        ("failures: 2", "failures: 0", "c.yaml:8: TrafficPolicy careful, spec.breaker.failures: "
         "0 is not between 1 and 2147483647"),
        ("2m", "500ms", "c.yaml:8: TrafficPolicy careful, spec.breaker.openTime: longer than maxOpenTime, 500ms "
         "(raise maxOpenTime too)"),
        ("0.1", ".nan", "c.yaml:8: TrafficPolicy careful, spec.breaker.jitter: nan is not between 0 and 1"),
        ("1s", "0s", 'c.yaml:9: TrafficPolicy careful, spec.connect.totalTimeout: "0s" is no time at all'),
        ("1s", "9999999h", 'c.yaml:9: TrafficPolicy careful, spec.connect.totalTimeout: "9999999h" is too long'),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_traffic_policy_is_named_with_its_very_line(old: str, new: str, message: str) -> None:
    assert TRAFFIC.count(old) == 1
    assert refusal(DB, WEB, TRAFFIC.replace(old, new)) == message


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[db]", "[dbs]", "b.yaml:6: AccessPolicy data/readers, spec.services[0]: there is no service "
         '"dbs" in namespace data (did you mean "db"?)'),
        ("default/*", "default*/", "b.yaml:9: AccessPolicy data/readers, spec.rules[0].from.principals[0]: "
         '"spiffe://prod/ns/default*/" is not a SPIFFE id such as spiffe://prod/ns/default/sa/web'),
        ("[spiffe://prod/ns/default/*", "[prod/ns/*", "b.yaml:9: AccessPolicy data/readers, "
         'spec.rules[0].from.principals[0]: "prod/ns/*" begins no SPIFFE id: write it like spiffe://prod/ns/default/*'),
        ("*/sa/job", "*@job", "b.yaml:9: AccessPolicy data/readers, spec.rules[0].from.principals[1]: "
         '"*@job" ends no SPIFFE id: write it like */sa/web'),
        ("10.0.0.0/8", "10.0.0.1/8", "b.yaml:11: AccessPolicy data/readers, spec.rules[0].from.ipBlocks[0]: "
         '"10.0.0.1/8" is not a network such as 10.0.0.0/8 (did you mean "10.0.0.0/8"?)'),
        ("[5432]", "[0]", "b.yaml:13: AccessPolicy data/readers, spec.rules[0].to.ports[0]: "
         "0 is not between 1 and 65535"),
        ("        ports: [5432]\n", "        ports: []\n    - {}\n",
         "b.yaml:12: AccessPolicy data/readers, spec.rules[0].to: it says nothing (name ports)\n"
         "b.yaml:14: AccessPolicy data/readers, spec.rules[1]: an empty rule matches nobody (say from or to)"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_access_policy_is_named_with_its_very_line(old: str, new: str, message: str) -> None:
    assert ACCESS.count(old) == 1
    assert refusal(DB, ACCESS.replace(old, new)) == message


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ((DB, WEB + "---\n" + DB), "b.yaml:19: Service data/db: there is already a Service data/db (a.yaml:1) "
         "(rename or remove one of them)"),
        ((DB, DB.replace("name: db", "name: zz")), "b.yaml:5: Service data/zz, spec.addresses[0]: "
         "10.0.0.9:5432 is already an address of Service data/db (a.yaml:5) "
         "(give one of them another address or port)"),
        ((WEB, DB, TRAFFIC, TRAFFIC.replace("careful", "dare").replace("[web, data/db]", "[web]")),
         "d.yaml:5: TrafficPolicy dare, spec.services[0]: Service web is already treated by "
         "TrafficPolicy careful (c.yaml:1) (name it in one policy only)"),
        ((CONFIG, CONFIG.replace("name: mesh", "name: net")), "b.yaml:1: MeshConfig net: "
         "there is already a MeshConfig mesh (a.yaml:1) (a mesh has one MeshConfig)"),
        ((CONFIG.replace("prod", "Prod"),), "a.yaml:5: MeshConfig mesh, spec.trustDomain: "
         '"Prod" is not a trust domain: '
         "use a-z, 0-9, ., _ and -"),
    ],
)  # fmt: skip
def test_two_that_cannot_hold_together_are_both_named(texts: tuple[str, ...], message: str) -> None:
    assert refusal(*texts) == message


def test_every_file_with_a_problem_is_named() -> None:
    assert refusal(WEB.replace("spec:", "spek:"), DB, "a: [").splitlines() == [
        'a.yaml:5: Service web, spek: unknown field (did you mean "spec"?)',
        'a.yaml:1: Service web: the field "spec" is missing',
        "c.yaml:1: not valid YAML: did not find expected node content",
    ]


def test_resources_that_come_without_text_are_held_to_the_same_at_the_line_they_begin() -> None:
    located = parse_resources(DB, "a.yaml") + parse_resources(WEB.replace("80\n", "0\n", 1), "b.yaml")
    with pytest.raises(ConfigError) as caught:
        build_snapshot(located, 1)
    assert str(caught.value) == "b.yaml:1: Service web, spec.ports[0].port: 0 is not between 1 and 65535"
    good = parse_resources(DB, "a.yaml") + parse_resources(WEB, "b.yaml")
    assert build_snapshot(good, 7) == mesh(DB, WEB)


@given(st.permutations([WEB, DB, TRAFFIC, ACCESS, CONFIG]))
def test_the_order_of_files_does_not_matter(texts: list[str]) -> None:
    assert mesh(*texts) == mesh(WEB, DB, TRAFFIC, ACCESS, CONFIG)


_ALL = "---\n".join([WEB, DB, TRAFFIC, ACCESS, CONFIG])


@given(st.integers(0, len(_ALL)), st.integers(0, 20), st.text("-?:,[]{}*'\" \n\tab019~.", max_size=4))
@example(0, len(_ALL), "")
def test_no_damage_to_a_good_mesh_does_more_than_be_refused(start: int, length: int, new: str) -> None:
    error = error_of(_ALL[:start] + new + _ALL[start + length :])
    assert error is None or error.line >= 1


def error_of(text: str) -> ConfigError | None:
    try:
        mesh(text)
    except ConfigError as error:
        return error
    return None


_WORDS = st.text() | st.sampled_from(
    ["10.0.0.1", "fd00::1%eth0", "::", "1e9", "spiffe://a/b", "*", "a/b", "9" * 400 + "h"]
)
_NUMBERS = st.integers() | st.just(10**400)


@given(st.lists(_WORDS, min_size=12, max_size=12), st.lists(_NUMBERS, min_size=4, max_size=4))
def test_no_value_does_more_than_be_refused(words: list[str], numbers: list[int]) -> None:
    name, where, address, other, identity, block, principal, service, time, domain, host, own = map(json.dumps, words)
    port, target, weight, count = numbers
    text = (
        f"apiVersion: meshnet.dev/v1\nkind: Service\nmetadata: {{name: {name}, namespace: {where}}}\n"
        f"spec: {{addresses: [{address}, {own}], ports: [{{port: {port}, targetPort: {target}}}], endpoints: "
        f"[{{address: {other}, identity: {identity}, tunnel: meshnet, weight: {weight}}}, {{address: {host}}}]}}\n---\n"
        f"apiVersion: meshnet.dev/v1\nkind: TrafficPolicy\nmetadata: {{name: a}}\nspec: {{services: [{service}], "
        f"limits: {{maxPending: {count}, queueTimeout: {time}}}, breaker: {{openTime: {time}, jitter: 1.e+400}}}}\n"
        f"---\n"
        f"apiVersion: meshnet.dev/v1\nkind: AccessPolicy\nmetadata: {{name: a}}\nspec: {{action: DENY, services: "
        f"[{service}], rules: [{{from: {{principals: [{principal}], ipBlocks: [{block}]}}}}]}}\n---\n"
        f"apiVersion: meshnet.dev/v1\nkind: MeshConfig\nmetadata: {{name: a}}\nspec: {{trustDomain: {domain}}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        mesh(text)
    assert caught.value.line >= 1
