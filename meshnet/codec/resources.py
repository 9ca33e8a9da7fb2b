"""Mesh resources as YAML: one or more documents to a file, each held to its shape and each value to its line."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import yaml
from msgspec import inspect

from meshnet.codec.problem import Path, Problem, did_you_mean, in_one, in_words, mismatches, quoted
from meshnet.errors import ConfigError
from meshnet.model.resource import (
    API_VERSION,
    AccessPolicy,
    AnyResource,
    Located,
    MeshConfig,
    Service,
    TrafficPolicy,
)

_DEEPEST = 32  # libyaml's own composer recurses on the C stack: a million brackets would end the process
_KINDS = {kind.__name__: inspect.type_info(kind) for kind in (Service, TrafficPolicy, AccessPolicy, MeshConfig)}
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float")}
_TEXT_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "timestamp", "value", "merge")}

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML may have been built without libyaml


@dataclass(frozen=True, slots=True)
class Document:
    """A resource, and where each of its values stands."""

    resource: AnyResource
    file: str
    lines: dict[Path, int]
    top: Path = ()  # inside a List: its way to this item

    def line(self, path: Path = ()) -> int:
        """The line of the value at `path`, or of the closest thing around it that was written."""
        return _line(self.lines, self.top + path)


def parse_resources(text: str, file: str) -> list[Located]:
    """The resources of one file, shapes checked; what they mean together is for `build_snapshot`.

    Raises ConfigError that names every problem, a line each.
    """
    return [(document.resource, document.file, document.line()) for document in parse_documents(text, file)]


def parse_documents(text: str, file: str) -> list[Document]:
    """As `parse_resources`, with the line of every value."""
    documents: list[Document] = []
    errors: list[ConfigError] = []
    for value, lines in _values(text, file):
        for item, top in _items(value):
            found = list(_problems(item))
            if found:
                errors += [_error(problem, item, file, lines, top) for problem in found]
            else:
                resource = msgspec.convert(item, AnyResource, strict=True)
                documents.append(Document(resource, file, lines, top))
    if errors:
        raise in_one(errors)
    return documents


def _items(value: object) -> Iterator[tuple[object, Path]]:
    """One document's resources: one, those of a List, or none in an empty document."""
    if isinstance(value, dict) and value.get("kind") == "List" and isinstance(value.get("items", ""), list | None):
        for index, item in enumerate(value["items"] or []):
            yield item, ("items", index)
    elif value is not None:
        yield value, ()


def _problems(item: object) -> Iterator[Problem]:
    if not isinstance(item, dict):
        yield Problem((), f"expected a resource: a mapping of fields that begins with apiVersion: {API_VERSION}")
        return
    version, kind = item.get("apiVersion"), item.get("kind")
    if "apiVersion" not in item:
        yield Problem((), 'the field "apiVersion" is missing', f"write apiVersion: {API_VERSION}")
    elif version != API_VERSION:
        yield Problem(("apiVersion",), f"unknown apiVersion {quoted(str(version))}", f"write {API_VERSION}")
    elif "kind" not in item:
        yield Problem((), 'the field "kind" is missing', did_you_mean("", _KINDS))
    elif kind not in list(_KINDS):
        yield Problem(("kind",), f"unknown kind {quoted(str(kind))}", did_you_mean(str(kind), _KINDS))
    else:
        yield from mismatches(item, _KINDS[str(kind)])


def _error(problem: Problem, item: object, file: str, lines: dict[Path, int], top: Path) -> ConfigError:
    name = _name(item)
    where = ", ".join(part for part in (name, in_words(problem.path) if name else "") if part)
    text = f"{where}: {problem.text}" if where else problem.text
    return ConfigError(text, file=file, line=_line(lines, top + problem.path), suggestion=problem.suggestion)


def _name(item: object) -> str:
    """The title of something that may not be a resource."""
    match item:
        case {"kind": str(kind), "metadata": {"name": str(name), **rest}} if kind in _KINDS:
            namespace = rest.get("namespace", "default")
            return f"{kind} {name}" if namespace == "default" else f"{kind} {namespace}/{name}"
        case {"kind": str(kind)} if kind in _KINDS:
            return kind
        case _:
            return ""


def _line(lines: dict[Path, int], path: Path) -> int:
    while path not in lines:
        path = path[:-1]
    return lines[path]


def _values(text: str, file: str) -> Iterator[tuple[object, dict[Path, int]]]:
    """The plain value of each document, and the line of each part of it."""
    try:
        loader = _Loader(text)
        try:
            loader.get_event()  # the stream begins
            while not loader.check_event(yaml.StreamEndEvent):
                lines: dict[Path, int] = {(): loader.get_event().start_mark.line + 1}
                value = _Reader(loader, file, lines).value((), 0)
                loader.get_event()  # the document ends
                yield value, lines
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _refused(text, file, mark.line + 1 if mark else 0, error.problem or error.context or "") from None
    except yaml.reader.ReaderError as error:
        # libyaml counts bytes, PyYAML's own reader characters.
        before = text.encode()[: error.position] if _Loader is not yaml.SafeLoader else text[: error.position].encode()
        raise _refused(text, file, before.count(b"\n") + 1, error.reason) from None
    except UnicodeEncodeError as error:
        raise _refused(text, file, text.count("\n", 0, error.start) + 1, "half of a surrogate pair") from None


def _refused(text: str, file: str, line: int, why: str) -> ConfigError:
    line = min(line, text.rstrip("\n").count("\n") + 1)  # what is missing at the end, libyaml misses behind it
    written = text.split("\n")[line - 1 : line]
    hint = "indent with spaces, not tabs" if written and "\t" in written[0][: -len(written[0].lstrip())] else ""
    return ConfigError(f"not valid YAML: {why}", file=file, line=line, suggestion=hint)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Makes plain values out of a parser's events. Refuses what the safe loaders let pass: keys given twice, aliases
    (a few lines of them stand for gigabytes) and depth without end.
    """

    loader: Any  # yaml's loaders: types-PyYAML says little of what they take from their parser
    file: str
    lines: dict[Path, int]

    def value(self, path: Path, line_of_key: int) -> object:
        event = self.loader.get_event()
        line = event.start_mark.line + 1
        self.lines[path] = line_of_key or line
        if len(path) > _DEEPEST:
            raise ConfigError("nested too deeply", file=self.file, line=line)
        match event:
            case yaml.ScalarEvent():
                return self.scalar(event, line)
            case yaml.SequenceStartEvent():
                return self.sequence(path)
            case yaml.MappingStartEvent():
                return self.mapping(path)
            case _:
                raise ConfigError(
                    f"aliases such as *{event.anchor} are not read",
                    file=self.file,
                    line=line,
                    suggestion="write the value out",
                )

    def sequence(self, path: Path) -> list[object]:
        items: list[object] = []
        while not self.loader.check_event(yaml.SequenceEndEvent):
            items.append(self.value((*path, len(items)), 0))
        self.loader.get_event()
        return items

    def mapping(self, path: Path) -> dict[str, object]:
        fields: dict[str, object] = {}
        while not self.loader.check_event(yaml.MappingEndEvent):
            event = self.loader.get_event()
            line = event.start_mark.line + 1
            if not isinstance(event, yaml.ScalarEvent):
                raise ConfigError("a field's name must be text", file=self.file, line=line)
            key = event.value
            if key in fields:
                first = self.lines[(*path, key)]
                raise ConfigError(
                    f"the field {quoted(key)} is given twice, first on line {first}", file=self.file, line=line
                )
            fields[key] = self.value((*path, key), line)
        self.loader.get_event()
        return fields

    def scalar(self, event: yaml.ScalarEvent, line: int) -> object:
        tag = event.tag or self.loader.resolve(yaml.ScalarNode, event.value, event.implicit)
        if tag in _TEXT_TAGS:
            return event.value
        if tag not in _PLAIN_TAGS:
            raise ConfigError(f"the tag {quoted(tag)} is not read", file=self.file, line=line)
        try:
            return self.loader.construct_object(yaml.ScalarNode(tag, event.value))
        except (ValueError, LookupError):
            raise ConfigError(f"{quoted(event.value)} is not a value of {tag}", file=self.file, line=line) from None
