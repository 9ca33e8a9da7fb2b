"""meshnet.toml changed as a person would: its comments, its order and its other lines stay as they are."""

import re
from collections.abc import Collection, Mapping, MutableMapping

import tomlkit
from tomlkit.exceptions import ParseError

from meshnet.codec.problem import did_you_mean
from meshnet.codec.settings import KEYS, load_settings, typed
from meshnet.errors import ConfigError


def edited(text: str, assigned: Mapping[str, str], unset: Collection[str], file: str = "meshnet.toml") -> str:
    """`text` with the settings `assigned` (`section.key`: value as in a variable), and without those of `unset`.

    Raises ConfigError: a key that does not exist, with a suggestion, or a text that is not TOML, with its line. Whether
    the values are good is for `load_settings` to say of the whole.
    """
    for name in (*assigned, *unset):
        need_setting(name)
    try:
        document = tomlkit.parse(text)
    except ParseError:
        load_settings(text, {}, file)  # which names the line, and what to write
        raise
    for name, value in assigned.items():
        section, _, key = name.partition(".")
        if section not in document:
            document.add(section, tomlkit.table())
        _section(document, section, file)[key] = typed(value, KEYS[section][key])
    for name in unset:
        section, _, key = name.partition(".")
        if section in document:
            table = _section(document, section, file)
            table.pop(key, None)
            if not table:
                document.remove(section)
    return re.sub(r"\A\n+", "", tomlkit.dumps(document))


def need_setting(name: str) -> None:
    """Raises ConfigError, with what may have been meant, if there is no setting `name`."""
    section, _, key = name.partition(".")
    if key in KEYS.get(section, {}):
        return
    known = [f"{section}.{key}" for section, keys in KEYS.items() for key in keys]
    homes = [full for full in known if full.partition(".")[2] == name]
    meant = f"did you mean {homes[0]}?" if homes else did_you_mean(name, known)
    raise ConfigError(f"there is no setting {name}", suggestion=meant or "see them all: meshnet get")


def _section(document: tomlkit.TOMLDocument, section: str, file: str) -> MutableMapping[str, object]:
    """However it is written: under its [header], as dotted keys, or inline."""
    table: object = document[section]
    if not isinstance(table, MutableMapping):
        raise ConfigError(f"{section} is no section", file=file, suggestion=f"write [{section}] on a line of its own")
    return table
