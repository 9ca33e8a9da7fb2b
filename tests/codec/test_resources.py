import msgspec
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from meshnet.codec.resources import parse_documents, parse_resources
from meshnet.errors import ConfigError
from meshnet.model.resource import (
    API_VERSION,
    AccessPolicy,
    AccessPolicySpec,
    AnyResource,
    EndpointSpec,
    LimitsSpec,
    Metadata,
    PortSpec,
    Service,
    ServiceSpec,
    TrafficPolicy,
    TrafficPolicySpec,
)
from meshnet.model.service import Action, Balance, Mode, Rule, Source, Target, TunnelKind

WEB = """\
# The shop.
apiVersion: meshnet.dev/v1
kind: Service
metadata:
  name: web
  labels: {team: shop}
spec:
  addresses: [10.0.0.1]
  ports:
    - port: 80
      targetPort: 8080
      mode: strict
  endpoints:
    - address: 10.1.0.1
      tunnel: meshnet
      identity: spiffe://prod/ns/default/sa/web
    - address: 10.1.0.2
"""


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_resources(text, "a.yaml")
    return str(caught.value)


def test_a_service_is_read_with_the_line_it_begins_at() -> None:
    identity = "spiffe://prod/ns/default/sa/web"
    service = Service(
        api_version=API_VERSION,
        metadata=Metadata(name="web", labels={"team": "shop"}),
        spec=ServiceSpec(
            addresses=("10.0.0.1",),
            ports=(PortSpec(port=80, target_port=8080, mode=Mode.STRICT),),
            endpoints=(
                EndpointSpec(address="10.1.0.1", tunnel=TunnelKind.MESHNET, identity=identity),
                EndpointSpec(address="10.1.0.2"),
            ),
        ),
    )
    assert parse_resources(WEB, "a.yaml") == [(service, "a.yaml", 2)]


def test_documents_and_lists_hold_many_and_empty_ones_hold_none() -> None:
    items = "".join("- " + WEB.partition("\n")[2].replace("\n", "\n  ").rstrip(" ") for _ in range(2))
    text = f"---\n---\n{WEB}---\n# nothing\n---\napiVersion: v1\nkind: List\nitems:\n{items}"
    assert [line for _, _, line in parse_resources(text, "a.yaml")] == [4, 26, 42]
    assert parse_resources("", "a.yaml") == []
    assert parse_resources("apiVersion: v1\nkind: List\nitems:\n", "a.yaml") == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("v1", "v2", 'a.yaml:2: Service web, apiVersion: unknown apiVersion "meshnet.dev/v2" (write meshnet.dev/v1)'),
        ("Service", "Servce", 'a.yaml:3: unknown kind "Servce" (did you mean "Service"?)'),
        (
            "Service",
            "Deployment",
            'a.yaml:3: unknown kind "Deployment" (known: AccessPolicy, MeshConfig, Service, TrafficPolicy)',
        ),
        (
            "kind: Service\n",
            "",
            'a.yaml:2: the field "kind" is missing (known: AccessPolicy, MeshConfig, Service, TrafficPolicy)',
        ),
        (
            "apiVersion: meshnet.dev/v1\n",
            "",
            'a.yaml:2: Service web: the field "apiVersion" is missing (write apiVersion: meshnet.dev/v1)',
        ),
        ("  name: web\n", "", 'a.yaml:4: Service, metadata: the field "name" is missing'),
        ("shop}", "7}", "a.yaml:6: Service web, metadata.labels.team: expected text, got 7 (write it in quotes)"),
        ("shop}", "no}", "a.yaml:6: Service web, metadata.labels.team: expected text, got false (write it in quotes)"),
        (
            "targetPort",
            "target_port",
            'a.yaml:11: Service web, spec.ports[0].target_port: unknown field (did you mean "targetPort"?)',
        ),
        (
            "8080",
            '"8080"',
            'a.yaml:11: Service web, spec.ports[0].targetPort: expected a whole number, got "8080" '
            "(write it without quotes)",
        ),
        ("8080", "", "a.yaml:11: Service web, spec.ports[0].targetPort: expected a whole number, got nothing"),
        (
            "strict",
            "stict",
            'a.yaml:12: Service web, spec.ports[0].mode: "stict" is not one of "permissive", "strict", "disable" '
            '(did you mean "strict"?)',
        ),
        (
            "mode: strict",
            "mode: off",
            "a.yaml:12: Service web, spec.ports[0].mode: "
            'expected one of "permissive", "strict", "disable", got false (write it in quotes)',
        ),
        (
            "[10.0.0.1]",
            "10.0.0.1",
            'a.yaml:8: Service web, spec.addresses: expected a list, got "10.0.0.1" (write a list: [...])',
        ),
        (
            "    - address: 10.1.0.2",
            "    - adress: 10.1.0.2",
            'a.yaml:17: Service web, spec.endpoints[1].adress: unknown field (did you mean "address"?)\n'
            'a.yaml:17: Service web, spec.endpoints[1]: the field "address" is missing',
        ),
        (
            "    - address: 10.1.0.2",
            "    - 10.1.0.2",
            'a.yaml:17: Service web, spec.endpoints[1]: expected a mapping of fields, got "10.1.0.2"',
        ),
        ("    - address: 10.1.0.2", "    - *web", "a.yaml:17: aliases such as *web are not read (write the value out)"),
        ("10.1.0.2", "!!python/name:os.system",
         'a.yaml:17: the tag "tag:yaml.org,2002:python/name:os.system" is not read'),
        ("port: 80", "port: !!int x", 'a.yaml:10: "x" is not a value of tag:yaml.org,2002:int'),
        ("  ports:", "  addresses:", 'a.yaml:9: the field "addresses" is given twice, first on line 8'),
        ("  ports:", "\tports:", "a.yaml:9: not valid YAML: found character that cannot start any token "
         "(indent with spaces, not tabs)"),
        ("[10.0.0.1]", "[10.0.0.1", "a.yaml:9: not valid YAML: did not find expected ',' or ']'"),
        ("web\n", "w\x07b\n", "a.yaml:5: not valid YAML: control characters are not allowed"),
        ("web\n", "é\ud800\n", "a.yaml:5: not valid YAML: half of a surrogate pair"),
        ("  name: web\n", "  ? [a]\n  : b\n", "a.yaml:5: a field's name must be text"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_very_line_and_a_suggestion(old: str, new: str, message: str) -> None:
    assert WEB.count(old) >= 1
    assert refusal(WEB.replace(old, new, 1)) == message


def test_a_document_that_is_no_resource_is_refused() -> None:
    wanted = "a.yaml:2: expected a resource: a mapping of fields that begins with apiVersion: meshnet.dev/v1"
    assert refusal("---\n- 1\n") == wanted
    assert refusal("\nfree text\n") == wanted


def test_what_is_missing_at_the_end_of_a_file_is_on_its_last_line() -> None:
    assert refusal(WEB + "    - [\n") == "a.yaml:18: not valid YAML: did not find expected node content"


def test_the_problems_of_all_documents_are_told_at_once() -> None:
    text = WEB.replace("kind: Service", "kind: Srvice") + "---\n" + WEB.replace("spec:", "spek:")
    assert refusal(text).splitlines() == [
        'a.yaml:3: unknown kind "Srvice" (did you mean "Service"?)',
        'a.yaml:25: Service web, spek: unknown field (did you mean "spec"?)',
        'a.yaml:20: Service web: the field "spec" is missing',
    ]


def test_more_problems_than_anybody_reads_are_counted() -> None:
    lines = refusal("---\n".join(["kind: Service\n"] * 30)).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "and 10 more"


@pytest.mark.parametrize("unit", ["[", "- ", "{a: ", "? ", "a: &a [*a, "])
def test_depth_without_end_is_refused_at_once(unit: str) -> None:
    assert refusal(unit * 1_000_000).startswith("a.yaml:1: ")


def test_an_inline_value_has_the_line_of_its_own() -> None:
    (document,) = parse_documents(WEB, "a.yaml")
    assert document.line(("spec", "endpoints", 1, "address")) == 17
    assert document.line(("spec", "addresses", 0)) == 8
    assert document.line(("spec", "endpoints", 1, "weight")) == 17  # not written: the closest thing that is
    assert document.line() == 2


_NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20)
_METADATA = st.builds(Metadata, name=_NAMES, namespace=_NAMES, labels=st.dictionaries(_NAMES, _NAMES, max_size=3))
_NUMBERS = st.integers(-(2**40), 2**40)
_SERVICES = st.builds(
    ServiceSpec,
    addresses=st.lists(_NAMES, max_size=3).map(tuple),
    ports=st.lists(
        st.builds(PortSpec, port=_NUMBERS, name=_NAMES, mode=st.none() | st.sampled_from(Mode)), max_size=3
    ).map(tuple),
    endpoints=st.lists(
        st.builds(EndpointSpec, address=_NAMES, tunnel=st.sampled_from(TunnelKind), identity=_NAMES), max_size=3
    ).map(tuple),
)
_TRAFFIC = st.builds(
    TrafficPolicySpec,
    services=st.lists(_NAMES, max_size=3).map(tuple),
    balance=st.none() | st.sampled_from(Balance),
    limits=st.builds(LimitsSpec, max_connections=st.none() | _NUMBERS, queue_timeout=st.none() | _NAMES),
)
_SOURCES = st.builds(Source, principals=st.lists(_NAMES, max_size=2).map(tuple))
_TARGETS = st.builds(Target, ports=st.lists(_NUMBERS, max_size=2).map(tuple))
_UNSET = st.just(msgspec.UNSET)
_ACCESS = st.builds(
    AccessPolicySpec,
    action=st.sampled_from(Action),
    rules=st.lists(st.builds(Rule, source=_UNSET | _SOURCES, target=_UNSET | _TARGETS), max_size=3).map(tuple),
)
_RESOURCES: st.SearchStrategy[AnyResource] = st.one_of(
    st.builds(Service, api_version=st.just(API_VERSION), metadata=_METADATA, spec=_SERVICES),
    st.builds(TrafficPolicy, api_version=st.just(API_VERSION), metadata=_METADATA, spec=_TRAFFIC),
    st.builds(AccessPolicy, api_version=st.just(API_VERSION), metadata=_METADATA, spec=_ACCESS),
)


@given(st.lists(_RESOURCES, max_size=3))
def test_what_is_written_is_read_back(resources: list[AnyResource]) -> None:
    text = yaml.safe_dump_all(map(msgspec.to_builtins, resources), allow_unicode=True)
    assert [resource for resource, _, _ in parse_resources(text, "a.yaml")] == resources


@given(st.lists(_RESOURCES, min_size=1, max_size=3))
def test_every_field_stands_on_the_line_that_is_told(resources: list[AnyResource]) -> None:
    text = yaml.safe_dump_all(map(msgspec.to_builtins, resources), allow_unicode=True)
    for document in parse_documents(text, "a.yaml"):
        for path, line in document.lines.items():
            if path and path[-1] in {"port", "name", "address", "ports", "balance", "principals", "maxConnections"}:
                assert f"{path[-1]}:" in text.split("\n")[line - 1]


@given(st.text())
@example("\ufeff" + WEB)
@example("a: !!timestamp x")
@example("!!float _")
@example("a: " + "1" * 5000)
@example("<<: {a: 1}\n=: 2\n~: 3")
@example("kind: List\nitems: {}")
@example("kind: List\nitems: [~, [], {kind: List, items: []}]")
@example("apiVersion: meshnet.dev/v1\nkind: {}\n")
@example("apiVersion: meshnet.dev/v1\nkind: Service\nmetadata: {name: 1, namespace: []}\nspec: ~")
def test_no_text_does_more_than_be_refused(text: str) -> None:
    error = error_of(text)
    assert error is None or error.line >= 1


@given(st.integers(0, len(WEB)), st.integers(0, 30), st.text("-?:,[]{}#&*!|>'\"%@ \n\tab0~.", max_size=5))
def test_no_damage_to_a_good_file_does_more_than_be_refused(start: int, length: int, new: str) -> None:
    error = error_of(WEB[:start] + new + WEB[start + length :])
    assert error is None or 1 <= error.line <= WEB.count("\n") + new.count("\n") + 1


def error_of(text: str) -> ConfigError | None:
    try:
        parse_resources(text, "a.yaml")
    except ConfigError as error:
        return error
    return None
