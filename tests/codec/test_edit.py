"""meshnet.toml changed by `meshnet set`: only what was asked for."""

import pytest

from meshnet.codec.edit import edited
from meshnet.codec.settings import load_settings
from meshnet.errors import ConfigError

TEXT = """\
# Ours since 2024. Ask ops@ before a change.

[log]
level = "debug"   # until the migration is over
access = "json"

[capture]
# The way in, and the backup's port.
exclude_inbound_ports = [
    "22",
    "873",  # rsync
]
"""


def test_a_value_is_replaced_and_all_else_stays() -> None:
    assert edited(TEXT, {"log.access": "text"}, ()) == TEXT.replace('access = "json"', 'access = "text"')


def test_a_comment_beside_the_value_stays() -> None:
    assert edited(TEXT, {"log.level": "info"}, ()) == TEXT.replace('level = "debug"', 'level = "info"')


def test_a_new_section_comes_last() -> None:
    text = edited(TEXT, {"proxy.workers": "2", "proxy.mark": "0x2000"}, ())
    assert text.startswith(TEXT)
    settings = load_settings(text, {})
    assert (settings.proxy.workers, settings.proxy.mark, settings.log.level) == (2, 0x2000, "debug")


def test_lists_are_comma_separated() -> None:
    settings = load_settings(edited("", {"capture.exclude_inbound_ports": "22, 8000-8100"}, ()), {})
    assert settings.capture.exclude_inbound_ports == ("22", "8000-8100")
    assert load_settings(edited(TEXT, {"capture.exclude_inbound_ports": ""}, ()), {}).capture == (
        load_settings("[capture]\nexclude_inbound_ports = []\n", {}).capture
    )


def test_unset_is_the_default_again() -> None:
    text = edited(TEXT, {}, ("capture.exclude_inbound_ports", "log.level", "pool.max_idle"))
    settings = load_settings(text, {})
    assert settings.capture.exclude_inbound_ports == ("22",)
    assert (settings.log.level, settings.log.access) == ("info", "json")
    assert "[capture]" not in text


def test_a_section_in_dotted_keys_or_inline_is_understood() -> None:
    for text in ('log.level = "debug"\n', 'log = {level = "debug"}\n'):
        changed = edited(text, {"log.access": "off"}, ())
        settings = load_settings(changed, {})
        assert (settings.log.level, settings.log.access) == ("debug", "off")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("log.levle", 'did you mean "log.level"?'),
        ("exclude_inbound_ports", "did you mean capture.exclude_inbound_ports?"),
        ("nothing.alike", "see them all: meshnet get"),
    ],
)
def test_an_unknown_key_is_refused_with_what_was_meant(name: str, hint: str) -> None:
    for assigned, unset in (({name: "1"}, ()), ({}, (name,))):
        with pytest.raises(ConfigError) as refused:
            edited(TEXT, assigned, unset)
        assert refused.value.suggestion == hint


def test_a_file_that_is_no_toml_is_refused_with_its_line() -> None:
    with pytest.raises(ConfigError) as refused:
        edited("[log]\nlevel =\n", {"log.access": "off"}, (), "m.toml")
    assert (refused.value.file, refused.value.line) == ("m.toml", 2)


def test_a_section_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="log is no section"):
        edited("log = 1\n", {"log.level": "info"}, ())
