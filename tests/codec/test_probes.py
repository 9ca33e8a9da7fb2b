"""The checks of the probe relay: what `meshnet inject` writes a sidecar reads, and nothing else."""

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnet.codec.probes import Checks, read_checks, write_checks
from meshnet.codec.settings import load_settings
from meshnet.errors import ConfigError
from meshnet.model.probe import ENDPOINTS, GrpcCheck, HttpCheck, TcpCheck

_PORT, _TIMEOUT = st.integers(1, 65535), st.integers(1, 3600)
_VISIBLE = st.characters(min_codepoint=0x21, max_codepoint=0x7E)
_NAMES = st.builds(
    "{}/{}".format,
    st.from_regex(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", fullmatch=True),
    st.sampled_from(sorted(ENDPOINTS.values())),
)
_CHECKS = st.dictionaries(
    _NAMES,
    st.builds(TcpCheck, port=_PORT, timeout=_TIMEOUT)
    | st.builds(GrpcCheck, port=_PORT, timeout=_TIMEOUT, service=st.text())
    | st.builds(
        HttpCheck,
        port=_PORT,
        timeout=_TIMEOUT,
        path=st.text(_VISIBLE).map("/{}".format),
        scheme=st.sampled_from(["HTTP", "HTTPS"]),
        headers=st.lists(st.tuples(st.from_regex(r"[A-Za-z-]+", fullmatch=True), st.text(_VISIBLE)), max_size=3).map(
            tuple
        ),
    ),
    max_size=3,
)


@given(_CHECKS)
@settings(max_examples=40)
def test_what_is_written_is_read(checks: Checks) -> None:
    assert read_checks(write_checks(checks)) == checks


@given(st.text() | st.text('{}[]" \t,:'))
def test_no_text_does_more_than_be_refused(text: str) -> None:
    """Or it has none: `{ }`."""
    with suppress(ValueError):
        assert read_checks(text) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "not the checks of the probe relay: Expected `object`, got `array`"),
        ('{"app/livez":{"type":"udp","port":1}}', "Invalid value 'udp' - at `$[...].type`"),
        ('{"app/livez":{"type":"tcp","port":1,"x":1}}', "unknown field `x`"),
        ('{"app/livez":{"type":"tcp"}}', "missing required field `port`"),
        ('{"livez":{"type":"tcp","port":1}}', "livez: not a name such as web/startupz or web/livez or web/readyz"),
        ('{"a/../livez":{"type":"tcp","port":1}}', "a/../livez: not a name such as"),
        ('{"app/livez":{"type":"tcp","port":0}}', "app/livez: 0 is not a port"),
        ('{"app/livez":{"type":"grpc","port":65536}}', "app/livez: 65536 is not a port"),
        ('{"app/livez":{"type":"tcp","port":1,"timeout":0}}', "0 is not a time-out from 1 to 3600 seconds"),
        ('{"app/livez":{"type":"http","port":1,"path":"x"}}', "'x' is not the path of a URL"),
        ('{"app/livez":{"type":"http","port":1,"path":"/ HTTP/1.1\\r\\nX: y"}}', "is not the path of a URL"),
        ('{"app/livez":{"type":"http","port":1,"headers":[["a b","c"]]}}', "'a b' is not the name of a header"),
        ('{"app/livez":{"type":"http","port":1,"headers":[["a","b\\r\\nc"]]}}', "cannot be the value of the header a"),
    ],
)
def test_what_is_wrong_is_told(text: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_checks(text)
    assert said in str(caught.value)


def test_the_settings_refuse_it_with_its_variable() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings("", {"MESHNET_PROBES__CHECKS": '{"app/livez":{"type":"tcp","port":0}}'})
    assert str(caught.value).startswith("MESHNET_PROBES__CHECKS: probes.checks: app/livez: 0 is not a port")


def test_the_port_is_the_sidecar_s_own_only_where_it_relays() -> None:
    checks = {"MESHNET_PROBES__CHECKS": '{"app/livez":{"type":"tcp","port":80}}'}
    assert 15121 not in load_settings("", {}).own_ports()
    assert 15121 in load_settings("", checks).own_ports()
    assert load_settings("", {"MESHNET_ADMIN__HEALTH_PORT": "15121"}).admin.health_port == 15121
    with pytest.raises(ConfigError, match=r"admin\.health_port: 15121 is already probes\.port|probes\.port: 15121"):
        load_settings("", {"MESHNET_ADMIN__HEALTH_PORT": "15121"} | checks)
