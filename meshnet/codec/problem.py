"""What is wrong with what a user wrote: where, what, and what was probably meant."""

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from msgspec import inspect

from meshnet.errors import ConfigError

Path = tuple[str | int, ...]
"""The way from the top of a document to one value: field names and places in lists, from 0."""

_MOST_TOLD = 20


@dataclass(frozen=True, slots=True)
class Problem:
    path: Path
    text: str
    suggestion: str = ""


def in_words(path: Path) -> str:
    """`spec.ports[0].port`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def quoted(text: str) -> str:
    """`text` between double quotes, shortened, on one line and safe to print."""
    short = text if len(text) <= 80 else text[:77] + "..."
    return json.dumps(short, ensure_ascii=not short.isprintable())


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The closest of the `known`, or all of them when none is close and they are few."""
    names = sorted(known)
    return _closest(word, names) or (f"known: {', '.join(names)}" if 0 < len(names) <= 12 else "")


def mismatches(value: object, kind: inspect.Type, path: Path = ()) -> Iterator[Problem]:
    """Every way in which a plain value is not of `kind`; msgspec names the first only, and suggests nothing."""
    match kind:
        case inspect.UnionType(types=types):
            if value is not None or not any(isinstance(each, inspect.NoneType) for each in types):
                yield from mismatches(value, next(t for t in types if not isinstance(t, inspect.NoneType)), path)
        case inspect.StructType() if isinstance(value, dict):
            yield from _field_mismatches(value, kind, path)
        case inspect.DictType(value_type=item) if isinstance(value, dict):
            for key, each in value.items():
                yield from mismatches(each, item, (*path, key))
        case inspect.VarTupleType(item_type=item) if isinstance(value, list):
            for index, each in enumerate(value):
                yield from mismatches(each, item, (*path, index))
        case inspect.EnumType() | inspect.LiteralType() if isinstance(value, str):
            choices = _choices(kind)
            if value not in choices:
                yield Problem(path, f"{quoted(value)} is not one of {_listed(choices)}", _closest(value, choices))
        case inspect.StrType() if isinstance(value, str):
            pass
        case inspect.BoolType() if isinstance(value, bool):
            pass
        case inspect.IntType() if isinstance(value, int) and not isinstance(value, bool):
            pass
        case inspect.FloatType() if isinstance(value, int | float) and not isinstance(value, bool):
            pass
        case _:
            yield Problem(path, f"expected {_expected(kind)}, got {_got(value)}", _hint(value, kind))


def in_one(errors: Sequence[ConfigError]) -> ConfigError:
    """All of `errors`, of which there is at least one, a line each; it has the place of the first."""
    first, *others = errors
    if not others:
        return first
    lines = [first.problem + (f" ({first.suggestion})" if first.suggestion else "")]
    lines += [str(error) for error in others[: _MOST_TOLD - 1]]
    if len(errors) > _MOST_TOLD:
        lines.append(f"and {len(errors) - _MOST_TOLD} more")
    return ConfigError("\n".join(lines), file=first.file, line=first.line)


def _field_mismatches(value: dict[str, object], kind: inspect.StructType, path: Path) -> Iterator[Problem]:
    fields = {field.encode_name: field for field in kind.fields}
    known = {*fields, kind.tag_field} - {None}
    for key, each in value.items():
        if key in fields:
            yield from mismatches(each, fields[key].type, (*path, key))
        elif key not in known:
            yield Problem((*path, key), "unknown field", did_you_mean(key, fields))
    for name, field in fields.items():
        if field.required and name not in value:
            yield Problem(path, f"the field {quoted(name)} is missing")


def _closest(word: str, names: Iterable[str]) -> str:
    plain = {_plain(name): name for name in names}
    close = difflib.get_close_matches(_plain(word[:100]), plain, n=1)
    return f"did you mean {quoted(plain[close[0]])}?" if close else ""


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").casefold()


def _choices(kind: inspect.EnumType | inspect.LiteralType) -> list[str]:
    """In the order of the definition where there is one: msgspec sorts the values of a Literal."""
    if isinstance(kind, inspect.EnumType):
        return [str(member.value) for member in kind.cls]
    return [str(value) for value in kind.values]


def _listed(choices: Iterable[str]) -> str:
    return ", ".join(map(quoted, choices))


_WORDS = ("true", "false")


def _expected(kind: inspect.Type) -> str:
    match kind:
        case inspect.UnionType(types=types):
            return _expected(next(each for each in types if not isinstance(each, inspect.NoneType)))
        case inspect.EnumType() | inspect.LiteralType():
            return f"one of {_listed(_choices(kind))}"
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType():
            return "a whole number"
        case inspect.FloatType():
            return "a number"
        case inspect.StrType():
            return "text"
        case inspect.VarTupleType():
            return "a list"
        case _:
            return "a mapping of fields"


def _got(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            return quoted(value)
        case int() | float():
            return str(value)[:40]
        case list():
            return "a list"
        case dict():
            return "a mapping of fields"
        case _:
            return f"a {type(value).__name__}"


def _hint(value: object, kind: inspect.Type) -> str:
    if isinstance(kind, inspect.StrType | inspect.EnumType | inspect.LiteralType):
        return "write it in quotes" if isinstance(value, bool | int | float) else ""
    plain = isinstance(value, str) and (value.isdecimal() if isinstance(kind, inspect.IntType) else value in _WORDS)
    if isinstance(kind, inspect.IntType | inspect.BoolType) and plain:
        return "write it without quotes"
    return "write a list: [...]" if isinstance(kind, inspect.VarTupleType) and isinstance(value, str) else ""
