import tomllib

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from meshnet.codec.settings import Origin, load_settings, settings_with_origin
from meshnet.errors import ConfigError
from meshnet.model.settings import Settings

TOML = '(a setting is a line such as mark = 4096, level = "info" or inbound_ports = ["80", "443"])'


def refusal(text: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(text, environ or {})
    return str(caught.value)


def test_nothing_written_means_the_defaults() -> None:
    assert load_settings("", {}) == Settings()


def test_the_environment_beats_the_file_and_the_file_beats_the_default() -> None:
    text = '[proxy]\nrelay_threads = 2\nmark = 0x10\n[log]\nlevel = "error"\n'
    found = load_settings(
        text, {"MESHNET_PROXY__MARK": "0x20", "MESHNET_CAPTURE__EXCLUDE_OUTBOUND_PORTS": "22, 8000-9000"}
    )
    assert (found.proxy.relay_threads, found.proxy.mark, found.log.level) == (2, 0x20, "error")
    assert found.capture.exclude_outbound_ports == ("22", "8000-9000")
    assert found.proxy.outbound_port == 15101


def test_a_variable_says_how_many_workers() -> None:
    assert load_settings("", {"MESHNET_PROXY__WORKERS": "4"}).proxy.workers == 4
    assert refusal("", {"MESHNET_PROXY__WORKERS": "0"}).startswith(
        "MESHNET_PROXY__WORKERS: proxy.workers: 0 is not between 1 and 64"
    )


def test_what_is_true_or_false_is_said_in_those_words() -> None:
    assert load_settings("[capture]\nrequired = true\n", {}).capture.required
    assert load_settings("", {"MESHNET_CAPTURE__REQUIRED": "True"}).capture.required
    assert not load_settings("[capture]\nrequired = true\n", {"MESHNET_CAPTURE__REQUIRED": "false"}).capture.required
    assert refusal("", {"MESHNET_CAPTURE__REQUIRED": "yes"}).startswith(
        'MESHNET_CAPTURE__REQUIRED: capture.required: expected true or false, got "yes"'
    )
    assert refusal("[capture]\nrequired = 1\n").startswith(
        "meshnet.toml:2: capture.required: expected true or false, got 1"
    )


def test_the_time_between_proofs_is_one_or_off() -> None:
    assert load_settings("", {"MESHNET_CAPTURE__PROOF_INTERVAL": "off"}).capture.proof_interval == "off"
    assert refusal("[capture]\nproof_interval = '0s'\n").startswith(
        'meshnet.toml:2: capture.proof_interval: "0s" is no time at all'
    )
    assert "is not a duration" in refusal("[capture]\nproof_interval = 'never'\n")
    assert refusal("[capture]\nproof_interval = 'off'\nrequired = true\n").startswith(
        'meshnet.toml:3: capture.required: cannot be true while capture.proof_interval is "off"'
    )
    assert load_settings("[capture]\ninbound_proof_interval = 'off'\n", {}).capture.inbound_proof_interval == "off"
    assert refusal("[capture]\ninbound_proof_interval = '50ms'\n").startswith(
        'meshnet.toml:2: capture.inbound_proof_interval: "50ms" is shorter than 0.1 s'
    )
    assert 'not one of "closed", "open"' in refusal("[capture]\nfail = 'maybe'\n")


def test_an_empty_variable_is_an_empty_list() -> None:
    assert load_settings("", {"MESHNET_CAPTURE__INBOUND_PORTS": ""}).capture.inbound_ports == ()
    assert load_settings("", {"MESHNET_CAPTURE__STRICT": "true"}).capture.strict
    assert not load_settings("[capture]\nstrict = true", {"MESHNET_CAPTURE__STRICT": "False"}).capture.strict


def test_every_setting_says_where_it_comes_from() -> None:
    text = '# mark = 1\n[proxy]\n\nmark = 7\n[log]\naccess = "json"\n'
    _, origins = settings_with_origin(text, {"MESHNET_LOG__LEVEL": "debug"}, "/etc/meshnet.toml")
    assert origins["proxy.mark"] == Origin("file", "/etc/meshnet.toml:4")
    assert origins["log.access"] == Origin("file", "/etc/meshnet.toml:6")
    assert origins["log.level"] == Origin("env", "MESHNET_LOG__LEVEL")
    assert origins["proxy.outbound_port"] == Origin("default")
    assert len(origins) == sum(len(msgspec.structs.fields(type(s))) for s in msgspec.structs.astuple(Settings()))


def test_other_variables_of_ours_and_of_kubernetes_are_no_settings() -> None:
    others = {
        "MESHNET_CONFIG": "x",
        "MESHNET_SOCKET": "x",
        "MESHNET_OUTPUT": "json",
        "MESHNET_TOKEN": "x",
        "MESHNET_SERVICE_HOST": "10.0.0.1",
        "MESHNET_PORT_15110_TCP_ADDR": "10.0.0.1",
        "PATH": "x__y",
    }
    assert load_settings("", others) == Settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[prxy]\n", 'meshnet.toml:1: prxy: unknown section (did you mean "proxy"?)'),
        (
            "[proxy]\noutbund_port = 1\n",
            'meshnet.toml:2: proxy.outbund_port: unknown key (did you mean "outbound_port"?)',
        ),
        (
            "[proxy]\nmark = 1\nworkers = 65\n",
            "meshnet.toml:3: proxy.workers: 65 is not between 1 and 64 (write workers = 1, the default)",
        ),
        (
            "[proxy]\nworkers = 'two'\n",
            'meshnet.toml:2: proxy.workers: expected a whole number, got "two" (write workers = 1, the default)',
        ),
        ("[proxy]\nbackend = 'nft'\n", "meshnet.toml:2: proxy.backend: unknown key (it belongs to [capture])"),
        (
            "[proxy]\nrelay_threads = '2'\n",
            'meshnet.toml:2: proxy.relay_threads: expected a whole number, got "2" (write it without quotes)',
        ),
        (
            "[proxy]\nmark = true\n",
            "meshnet.toml:2: proxy.mark: expected a whole number, got true (write mark = 4096, the default)",
        ),
        (
            "[log]\nlevel = 'warn'\n",
            'meshnet.toml:2: log.level: "warn" is not one of "debug", "error", "info", "warning" '
            '(did you mean "warning"?)',
        ),
        (
            "[capture]\nexclude_inbound_ports = 22\n",
            "meshnet.toml:2: capture.exclude_inbound_ports: expected a list, got 22 "
            '(write exclude_inbound_ports = ["22"], the default)',
        ),
        (
            "[capture]\nexclude_inbound_ports = [\n  '22',\n  22,\n]\n",
            "meshnet.toml:2: capture.exclude_inbound_ports[1]: expected text, got 22 (write it in quotes)",
        ),
        ("proxy = 3\n", "meshnet.toml:1: proxy: expected a section (write [proxy] on a line of its own)"),
        (
            "[proxy]\n\nmark = 0\n",
            "meshnet.toml:3: proxy.mark: 0 is not between 1 and 4294967295 (write mark = 4096, the default)",
        ),
        (
            "[proxy]\nmark = 0x1_0000_0000\n",
            "meshnet.toml:2: proxy.mark: 4294967296 is not between 1 and 4294967295 (write mark = 4096, the default)",
        ),
        (
            "[proxy]\nrelay_threads = 0\n",
            "meshnet.toml:2: proxy.relay_threads: 0 is not between 1 and 1024 (write relay_threads = 1, the default)",
        ),
        (
            "[capture]\ngid = 0\n",
            "meshnet.toml:2: capture.gid: 0 is not between 1 and 4294967294 (write gid = 15137, the default)",
        ),
        (
            "[proxy]\ninbound_port = 65536\n",
            "meshnet.toml:2: proxy.inbound_port: 65536 is not between 1 and 65535 "
            "(write inbound_port = 15106, the default)",
        ),
        (
            "[admin]\nhealth_port = 15101\n",
            "meshnet.toml:2: admin.health_port: 15101 is already proxy.outbound_port (write another port)",
        ),
        (
            "[proxy]\ntunnel_port = 15120\n",
            "meshnet.toml:2: proxy.tunnel_port: 15120 is already admin.health_port (write another port)",
        ),
        (
            "[proxy]\ndrain_timeout = '30'\n",
            'meshnet.toml:2: proxy.drain_timeout: "30" is not a duration such as 250ms, 3s, 5m or 1h30m (write "30s")',
        ),
        (
            "[capture]\nreadiness_port = 15106\n",
            "meshnet.toml:2: capture.readiness_port: 15106 is already proxy.inbound_port (write another port)",
        ),
        (
            "[admin]\nhealth_address = 'lo'\n",
            'meshnet.toml:2: admin.health_address: "lo" is neither an IP address nor * '
            '(write health_address = "0.0.0.0", the default)',
        ),
        (
            "[mesh]\ndirectory = ''\n",
            'meshnet.toml:2: mesh.directory: "" is not a path (write directory = "/etc/meshnet/mesh.d", the default)',
        ),
        (
            "[capture]\nexclude_outbound_cidrs = ['10.0.0.1/8']\n",
            'meshnet.toml:2: capture.exclude_outbound_cidrs[0]: "10.0.0.1/8" is not a network such as 10.0.0.0/8 '
            '(did you mean "10.0.0.0/8"?)',
        ),
        (
            "[capture]\nexclude_uids = ['root']\n",
            'meshnet.toml:2: capture.exclude_uids[0]: "root" is not an id (write its number, as `id` prints it)',
        ),
        (
            "[capture]\ninbound_interfaces = ['*', 'lo']\n",
            'meshnet.toml:2: capture.inbound_interfaces[1]: "lo" is not an interface such as docker0, '
            "or the beginning of some such as veth*"
            ' (write inbound_interfaces = ["*"], the default)',
        ),
        (
            "[capture]\nstrict = 'true'\n",
            'meshnet.toml:2: capture.strict: expected true or false, got "true" (write it without quotes)',
        ),
        (
            "[capture]\nexclude_cgroups = ['system.slice/../cron.service']\n",
            'meshnet.toml:2: capture.exclude_cgroups[0]: "system.slice/../cron.service" is not the path of a cgroup '
            "such as system.slice/cron.service (write exclude_cgroups = [], the default)",
        ),
        (
            "[capture]\noutbound_cgroups = ['-j']\n",
            'meshnet.toml:2: capture.outbound_cgroups[0]: "-j" is not the path of a cgroup '
            "such as system.slice/cron.service (write outbound_cgroups = [], the default)",
        ),
        (
            "[capture]\nudp = 'drop'\n",
            'meshnet.toml:2: capture.udp: "drop" is not one of "allow", "count", "reject" '
            '(write udp = "allow", the default)',
        ),
        (
            "capture.truthful_connect = true\nproxy.workers = 2\n",
            "meshnet.toml:1: capture.truthful_connect: cannot be true while proxy.workers is above 1"
            " (one process holds all connections: write workers = 1, or leave it false)",
        ),
        (
            "capture.truthful_connect = true\nproxy.mark = 0xffffffff\n",
            "meshnet.toml:1: capture.truthful_connect: needs two bits that proxy.mark and proxy.local_mark leave free"
            " (write truthful_connect = false, the default)",
        ),
        (
            "capture.original_source = true\nproxy.local_mark = 0x3000\n",
            "meshnet.toml:2: proxy.local_mark: proxy.mark 0x1000 and local_mark 0x3000 share a bit"
            " (write local_mark = 8192, the default)",
        ),
        (
            "capture.original_source = true\nproxy.mark = 0x2000\n",
            "meshnet.toml:2: proxy.mark: proxy.mark 0x2000 and local_mark 0x2000 share a bit"
            " (write mark = 4096, the default)",
        ),
        (
            "[capture]\nexclude_interfaces = ['eth0 -j ACCEPT']\n",
            'meshnet.toml:2: capture.exclude_interfaces[0]: "eth0 -j ACCEPT" is not an interface such as docker0, '
            "or the beginning of some such as veth* (write exclude_interfaces = [], the default)",
        ),
        (
            "[capture]\nexclude_inbound_ports = ['*']\n",
            'meshnet.toml:2: capture.exclude_inbound_ports[0]: "*" is not a port such as 8080 '
            'or a range such as 8000-8100 (write exclude_inbound_ports = ["22"], the default)',
        ),
        (
            "[capture]\noutbound_ports = ['9000-8000']\n",
            'meshnet.toml:2: capture.outbound_ports[0]: "9000-8000" is not a port such as 8080 '
            'or a range such as 8000-8100 (write outbound_ports = ["*"], the default)',
        ),
        ("[proxy]\nmark = \n", f"meshnet.toml:2: not valid TOML: Invalid value {TOML}"),
        ("[proxy]\nmark = 1\nmark = 2\n", f"meshnet.toml:3: not valid TOML: Cannot overwrite a value {TOML}"),
        ("[proxy]\nmark", f"meshnet.toml:2: not valid TOML: Expected '=' after a key in a key/value pair {TOML}"),
    ],
)
def test_what_is_wrong_in_the_file_is_named_with_line_and_suggestion(text: str, message: str) -> None:
    assert refusal(text) == message


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "MESHNET_PROXY__MARK",
            "x",
            'MESHNET_PROXY__MARK: proxy.mark: expected a whole number, got "x" '
            "(set MESHNET_PROXY__MARK=4096, the default, or unset it)",
        ),
        (
            "MESHNET_PROXY__MARK",
            "0",
            "MESHNET_PROXY__MARK: proxy.mark: 0 is not between 1 and 4294967295 "
            "(set MESHNET_PROXY__MARK=4096, the default, or unset it)",
        ),
        ("MESHNET_PROXY__MARC", "1", 'MESHNET_PROXY__MARC: proxy.marc: unknown key (did you mean "mark"?)'),
        ("MESHNET_PRXY__MARK", "1", 'MESHNET_PRXY__MARK: prxy: unknown section (did you mean "proxy"?)'),
        ("MESHNET_PROXY_MARK", "1", "MESHNET_PROXY_MARK: this sets nothing (did you mean MESHNET_PROXY__MARK?)"),
        (
            "MESHNET_CAPTURE__OUTBOUND_CIDRS",
            "10.0.0.0/8,lan",
            'MESHNET_CAPTURE__OUTBOUND_CIDRS: capture.outbound_cidrs[1]: "lan" is not a network such as 10.0.0.0/8 '
            "(set MESHNET_CAPTURE__OUTBOUND_CIDRS=*, the default, or unset it)",
        ),
    ],
)
def test_what_is_wrong_in_the_environment_is_named_with_its_variable(variable: str, value: str, message: str) -> None:
    assert refusal("", {variable: value}) == message


def test_all_problems_are_told_at_once_and_the_error_has_the_place_of_the_first() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings("[proxy]\nmark = 'x'\nmrak = 1\n[lgo]\n", {"MESHNET_LOG__LEVEL": "loud"}, "m.toml")
    assert str(caught.value).splitlines() == [
        'm.toml:2: proxy.mark: expected a whole number, got "x" (write mark = 4096, the default)',
        'm.toml:3: proxy.mrak: unknown key (did you mean "mark"?)',
        'm.toml:4: lgo: unknown section (did you mean "log"?)',
        'MESHNET_LOG__LEVEL: log.level: "loud" is not one of "debug", "error", "info", "warning" '
        "(set MESHNET_LOG__LEVEL=info, the default, or unset it)",
    ]
    assert (caught.value.file, caught.value.line) == ("m.toml", 2)


def test_the_line_is_right_where_names_of_keys_stand_in_comments_and_in_text() -> None:
    text = '# mark\n[mesh]\ndirectory = """\nmark = 1\n[proxy]\nmark = 2\n"""\n[proxy] # mark\n# mark = 3\nmark = 0\n'
    problem = "proxy.mark: 0 is not between 1 and 4294967295 (write mark = 4096, the default)"
    assert refusal(text) == f"meshnet.toml:10: {problem}"


@pytest.mark.parametrize(
    "text",
    [
        "proxy.mark = 0",
        "proxy = { inbound_port = 3, mark = 0 }",
        '["proxy"]\n"mark" = 0',
        "[proxy]\r\nmark = 0\r\n",
        '[proxy]\n"m\\u0061rk" = 0',
    ],
)
def test_the_line_is_found_however_the_key_is_spelt(text: str) -> None:
    line = 1 if "\n" not in text or "\\u" in text else 2
    assert refusal(text).startswith(f"meshnet.toml:{line}: proxy.mark: 0 is not")


@pytest.mark.parametrize("written", ["file", "environment"])
def test_every_wrong_setting_is_told_with_what_to_write(written: str) -> None:
    for section in msgspec.structs.fields(Settings):
        for key in msgspec.structs.fields(section.type):
            environ = {f"MESHNET_{section.name}__{key.name}".upper(): "\0"} if written == "environment" else {}
            error = error_of("" if environ else f"{section.name}.{key.name} = {{}}", environ)
            if error is not None:
                assert (error.line, error.file) == ((0, *environ) if environ else (1, "meshnet.toml"))
                assert error.suggestion, error
            else:
                assert environ
                assert key.type is str, f"{section.name}.{key.name} takes anything"


def test_nesting_without_end_is_refused() -> None:
    assert refusal("a = " + "[" * 100_000) == "meshnet.toml: not valid TOML: nested too deeply"


@given(st.text())
@example("a = " + "1" * 5000)
@example("a\x00 = 1")
@example("[proxy]\n[proxy.mark]\n[[proxy.x]]")
@example("proxy = [1]\n[log]\naccess = 1979-05-27")
def test_no_text_does_more_than_be_refused(text: str) -> None:
    error = error_of(text, {"MESHNET_PROXY__MARK": "5"})
    assert error is None or str(error)


_FRAGMENTS = [
    "[proxy]",
    "[capture]",
    "mark",
    "inbound_ports",
    "=",
    " = ",
    "1",
    "'x'",
    "[",
    "]",
    "{",
    "}",
    '"""',
    "\n",
    ",",
    "#",
    ".",
]


@given(st.lists(st.sampled_from(_FRAGMENTS)).map("".join))
@settings(max_examples=300)
def test_a_line_that_is_told_exists(text: str) -> None:
    error = error_of(text, {})
    assert error is None or (0 <= error.line <= text.count("\n") + 1)


@given(st.text(), st.text())
def test_no_variable_does_more_than_be_refused(name: str, value: str) -> None:
    environ = {f"MESHNET_{name}": value, f"MESHNET_{name}__{value}": name, "MESHNET_PROXY__MARK": value}
    error = error_of("", environ)
    assert error is None or str(error).startswith("MESHNET_")


def error_of(text: str, environ: dict[str, str]) -> ConfigError | None:
    try:
        load_settings(text, environ)
    except ConfigError as error:
        return error
    return None


_PORTS = st.lists(st.integers(1, 65535), min_size=4, max_size=4, unique=True)
_TEXTS = st.text(st.characters(exclude_categories=["C"]), min_size=1)


@given(_PORTS, st.integers(1, 2**32 - 1), _TEXTS, st.lists(st.integers(1, 65535).map(str)))
def test_file_and_environment_say_the_same(ports: list[int], mark: int, directory: str, excluded: list[str]) -> None:
    outbound, inbound, tunnel, health = ports
    wanted: dict[str, dict[str, object]] = {
        "proxy": {"outbound_port": outbound, "inbound_port": inbound, "tunnel_port": tunnel, "mark": mark},
        "admin": {"health_port": health},
        "mesh": {"directory": directory},
        "capture": {"exclude_outbound_ports": excluded},
    }
    pairs = [(section, key, value) for section, values in wanted.items() for key, value in values.items()]
    text = "".join(f"{section}.{key} = {_toml(value)}\n" for section, key, value in pairs)
    environ = {
        f"MESHNET_{section}__{key}".upper(): ",".join(value) if isinstance(value, list) else str(value)
        for section, key, value in pairs
    }
    assert load_settings(text, {}) == load_settings("", environ) == msgspec.convert(tomllib.loads(text), Settings)


def _toml(value: object) -> str:
    """A JSON string, number or list of strings is TOML too."""
    return msgspec.json.encode(value).decode()
