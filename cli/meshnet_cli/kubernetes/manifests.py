"""Manifests as text: YAML or JSON to plain values and back, read as kubectl reads them.

kubectl's YAML (sigs.k8s.io/yaml, go-yaml v2) and PyYAML differ where it matters: 1e3 is a number there, 22:22 and
2001-01-01 are text. What is text is printed so that both read it as text. A plain y or n, a boolean for some and text
for others, is printed as it came.
"""

import json
import re
from collections.abc import Iterable
from typing import Any, Literal

import yaml

from meshnet.errors import ConfigError

Object = dict[str, Any]
Form = Literal["yaml", "json"]

_DEEPEST = 100  # manifests of people are not half as deep
_TAG = "tag:yaml.org,2002:"
# What a plain scalar is, by its first letter: resolve.go of go-yaml v2.
_PLAIN: tuple[tuple[str, str, str], ...] = (
    ("bool", r"yes|Yes|YES|true|True|TRUE|on|On|ON|no|No|NO|false|False|FALSE|off|Off|OFF", "yYtToOnNfF"),
    ("letter", r"[yYnN]", "yYnN"),
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("int", r"[-+]?(?:0b[01_]+|0o?[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)", "-+0123456789."),
    ("float", r"\.(?:nan|NaN|NAN)", "."),
    ("merge", r"<<", "<"),
)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    found: dict[str, list[tuple[str, re.Pattern[str]]]] = {"": [(f"{_TAG}null", re.compile(r"(?:)$"))]}
    for name, pattern, letters in _PLAIN:
        for letter in letters:
            found.setdefault(letter, []).append((_TAG + name, re.compile(f"(?:{pattern})$")))
    return found


_LoaderOfYaml: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML may have been built without libyaml
_DumperOfYaml: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Letter(str):
    """A plain y or n."""


class _Loader(_LoaderOfYaml):  # type: ignore[misc]  # which of the two it is shows when it runs
    yaml_implicit_resolvers = _resolvers()


class _Dumper(_DumperOfYaml):  # type: ignore[misc]  # as above
    # Text that either would take for something else is quoted.
    yaml_implicit_resolvers = {
        letter: [*_resolvers().get(letter, []), *_DumperOfYaml.yaml_implicit_resolvers.get(letter, [])]
        for letter in {*_resolvers(), *_DumperOfYaml.yaml_implicit_resolvers}
    }

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: Any, text: str) -> Any:
    """Several lines as they are."""
    return dumper.represent_scalar(f"{_TAG}str", text, style="|" if "\n" in text else None)


def _letter(constructor: Any, node: Any) -> _Letter:
    return _Letter(constructor.construct_scalar(node))


_Loader.add_constructor(f"{_TAG}letter", _letter)
_Dumper.add_representer(str, _text)
_Dumper.add_representer(_Letter, lambda dumper, letter: dumper.represent_scalar(f"{_TAG}letter", str(letter)))


def read_documents(text: str, file: str) -> list[object]:
    """The documents that are not empty, keys as text. Raises ConfigError with the line."""
    try:
        documents = _json_documents(text) if text.lstrip().startswith("{") else None
        if documents is None:
            documents = list(yaml.load_all(text, _Loader))
        return [_plain(document, 0) for document in documents if document is not None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 0
        raise ConfigError(f"not valid YAML: {error.problem or error.context}", file=file, line=line) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"not valid YAML: {str(error).partition(chr(10))[0]}", file=file) from None


def write_documents(documents: Iterable[object], form: Form) -> str:
    """YAML documents with a line of --- between, or JSON documents one after the other; kubectl reads both."""
    if form == "json":
        return "".join(json.dumps(each, indent=2, ensure_ascii=False) + "\n" for each in documents)
    dumped = (
        yaml.dump(each, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31 - 1) for each in documents
    )
    return "---\n".join(dumped)


def _json_documents(text: str) -> list[object] | None:
    """None if it is not JSON: a YAML flow mapping begins alike."""
    decoder, found, at = json.JSONDecoder(), [], 0
    text = text.strip()
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return None
        found.append(value)
        while at < len(text) and text[at].isspace():
            at += 1
    return found


def _plain(value: object, depth: int) -> object:
    """Without shared parts, and with keys as JSON has them."""
    if depth > _DEEPEST:
        raise ValueError(f"nested deeper than {_DEEPEST}")
    match value:
        case dict():
            return {_key(key): _plain(each, depth + 1) for key, each in value.items()}
        case list():
            return [_plain(each, depth + 1) for each in value]
        case None | bool() | int() | float() | str():
            return value
        case _:
            raise ValueError(f"a {type(value).__name__} has no place in a manifest")


def _key(key: object) -> str:
    match key:
        case str():
            return key
        case bool():
            return "true" if key else "false"
        case int() | float():
            return str(key)
        case _:
            raise ValueError(f"{key!r} cannot be the name of a field")
