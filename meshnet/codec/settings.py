"""meshnet.toml and MESHNET_SECTION__KEY: an environment variable beats the file, the file beats the default."""

import ipaddress
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec
from msgspec import inspect

from meshnet.codec.fields import Fields
from meshnet.codec.probes import read_checks
from meshnet.codec.problem import Path, Problem, did_you_mean, in_one, in_words, mismatches, quoted
from meshnet.errors import ConfigError
from meshnet.model.address import CGROUPS, INTERFACES
from meshnet.model.settings import Settings

Table = dict[str, object]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a setting has its value from; `place` is `meshnet.toml:4` or the variable's name."""

    kind: Literal["default", "file", "env"]
    place: str = ""


def load_settings(text: str, environ: Mapping[str, str], file: str = "meshnet.toml") -> Settings:
    """The settings in force. Raises ConfigError that names every problem, a line each; `file` is for messages."""
    return _read(text, environ, file)[0]


def settings_with_origin(
    text: str, environ: Mapping[str, str], file: str = "meshnet.toml"
) -> tuple[Settings, dict[str, Origin]]:
    """As `load_settings`, and where each `section.key` comes from, defaults included."""
    settings, sources = _read(text, environ, file)
    return settings, {
        f"{section}.{key}": sources.origin((section, key)) for section, keys in KEYS.items() for key in keys
    }


def _read(text: str, environ: Mapping[str, str], file: str) -> tuple[Settings, "_Sources"]:
    sources = _Sources(text, file, _parse(text, file))
    merged: Table = {name: dict(part) if isinstance(part, dict) else part for name, part in sources.table.items()}
    for variable, path, value in _from_environment(environ):
        sources.variables[path] = variable
        section = merged.setdefault(path[0], {})
        if isinstance(section, dict):
            section[path[1]] = value
    problems = list(_shape_problems(merged))
    if not problems:
        settings = msgspec.convert(merged, Settings, strict=True)
        problems = _value_problems(settings)
    if not problems:
        return settings, sources
    raise in_one([sources.error(problem) for problem in problems])


def _parse(text: str, file: str) -> Table:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError("not valid TOML: nested too deeply", file=file) from None
    except ValueError as error:  # TOMLDecodeError, and what int() says of a number with thousands of digits
        problem, _, place = str(error).partition(" (at ")
        number = re.match(r"line (\d+)", place)
        line = int(number[1]) if number else text.count("\n") + 1 if place else 0
        hint = 'a setting is a line such as mark = 4096, level = "info" or inbound_ports = ["80", "443"]'
        raise ConfigError(f"not valid TOML: {problem}", file=file, line=line, suggestion=hint) from None


_SHORT_FORMS = {"MESHNET_RELAY": ("proxy", "relay")}


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, str], object]]:
    """Variable, (section, key) and value. Without the double underscore a variable is no setting, such as
    MESHNET_CONFIG or what Kubernetes sets for a service called meshnet, unless it is a short form or almost a setting.
    """
    almost = {f"MESHNET_{section}_{key}".upper(): (section, key) for section, keys in KEYS.items() for key in keys}
    for variable, text in sorted(environ.items()):
        section, double, key = variable.removeprefix("MESHNET_").lower().partition("__")
        if variable.startswith("MESHNET_") and double:
            yield variable, (section, key), typed(text, KEYS.get(section, {}).get(key))
        elif variable in _SHORT_FORMS:
            yield variable, _SHORT_FORMS[variable], text
        elif variable in almost:
            section, key = almost[variable]
            meant = f"MESHNET_{section}__{key}".upper()
            raise ConfigError("this sets nothing", file=variable, suggestion=f"did you mean {meant}?")


def typed(text: str, kind: inspect.Type | None) -> object:
    """What the text of a variable or an argument says; left as text if it is wrong, to be refused like any other."""
    if isinstance(kind, inspect.VarTupleType):
        return [part.strip() for part in text.split(",") if part.strip()]
    if isinstance(kind, inspect.BoolType):
        return {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(kind, inspect.IntType):
        try:
            return int(text, 16 if text.lower().startswith("0x") else 10)
        except ValueError:
            return text
    return text


def _shape_problems(table: Table) -> Iterator[Problem]:
    for section, values in table.items():
        if section not in KEYS:
            yield Problem((section,), "unknown section", did_you_mean(section, KEYS) or "leave it out")
        elif not isinstance(values, dict):
            yield Problem((section,), "expected a section", f"write [{section}] on a line of its own")
        else:
            for key, value in values.items():
                if key in KEYS[section]:
                    yield from mismatches(value, KEYS[section][key], (section, key))
                else:
                    yield Problem((section, key), "unknown key", _where_else(section, key))


def _where_else(section: str, key: str) -> str:
    homes = [f"[{other}]" for other, keys in KEYS.items() if key in keys]
    return f"it belongs to {' or '.join(homes)}" if homes else did_you_mean(key, KEYS[section]) or "leave it out"


def _value_problems(settings: Settings) -> list[Problem]:
    fields = Fields()
    proxy, admin, capture = settings.proxy, settings.admin, settings.capture
    defaults = Settings()
    taken: dict[int, Path] = {}
    ports = {
        ("proxy", "outbound_port"): proxy.outbound_port,
        ("proxy", "inbound_port"): proxy.inbound_port,
        ("proxy", "tunnel_port"): proxy.tunnel_port,
        ("admin", "health_port"): admin.health_port,
    }
    if settings.probes.checks:
        ports["probes", "port"] = settings.probes.port
        try:
            read_checks(settings.probes.checks)
        except ValueError as error:
            fields.wrong(("probes", "checks"), str(error))
    fields.port(("probes", "port"), settings.probes.port)
    if capture.readiness_port:
        ports["capture", "readiness_port"] = capture.readiness_port
    for path, port in ports.items():
        fields.port(path, port)
        if port in taken:
            # At least one of the two was written by somebody: there it can be mended.
            here, other = (path, taken[port]) if port != _value(defaults, path) else (taken[port], path)
            fields.wrong(here, f"{port} is already {in_words(other)}", "write another port")
        taken[port] = path
    fields.number(("proxy", "mark"), proxy.mark, 1, 2**32 - 1)
    fields.number(("proxy", "local_mark"), proxy.local_mark, 1, 2**32 - 1)
    if capture.original_source and proxy.mark & proxy.local_mark:
        # At least one of the two was written by somebody: there it can be mended.
        own = "mark" if proxy.local_mark == defaults.proxy.local_mark else "local_mark"
        fields.wrong(("proxy", own), f"proxy.mark {proxy.mark:#x} and local_mark {proxy.local_mark:#x} share a bit")
    if capture.truthful_connect:
        _check_truthful(fields, settings)
    fields.number(("proxy", "relay_threads"), proxy.relay_threads, 1, 1024)
    fields.number(("proxy", "workers"), proxy.workers, 1, 64)
    fields.wait(("proxy", "drain_timeout"), proxy.drain_timeout)
    try:
        ipaddress.ip_address("::" if admin.health_address == "*" else admin.health_address)
    except ValueError:
        fields.wrong(("admin", "health_address"), f"{quoted(admin.health_address)} is neither an IP address nor *")
    fields.number(("admin", "memory_mib"), admin.memory_mib, 0, 4096)
    fields.wait(("pool", "idle_timeout"), settings.pool.idle_timeout)
    fields.number(("pool", "max_idle"), settings.pool.max_idle, 0)
    fields.number(("capture", "gid"), capture.gid, 1, 2**32 - 2)
    for key in ("proof_interval", "inbound_proof_interval"):
        interval = getattr(capture, key)
        if interval != "off" and fields.duration(("capture", key), interval) < _SHORTEST_PROOF:
            fields.wrong(("capture", key), f"{quoted(interval)} is shorter than {_SHORTEST_PROOF:g} s")
    if capture.proof_interval == "off" and capture.required:
        wrong = 'cannot be true while capture.proof_interval is "off"'
        fields.wrong(("capture", "required"), wrong, "nothing would prove it: write an interval such as 30s")
    for key in _OF_PORTS:
        for index, text in enumerate(getattr(capture, key)):
            if not (text == "*" and key in ("inbound_ports", "outbound_ports")):
                _port_range(fields, ("capture", key, index), text)
    for key in ("inbound_cidrs", "exclude_inbound_cidrs", "outbound_cidrs", "exclude_outbound_cidrs"):
        for index, text in enumerate(getattr(capture, key)):
            if not (text == "*" and not key.startswith("exclude")):
                fields.network(("capture", key, index), text)
    for key in ("outbound_uids", "outbound_gids", "exclude_uids", "exclude_gids"):
        for index, text in enumerate(getattr(capture, key)):
            if re.fullmatch("[0-9]{1,10}", text) is None or int(text) > 2**32 - 2:
                fields.wrong(
                    ("capture", key, index), f"{quoted(text)} is not an id", "write its number, as `id` prints it"
                )
    for key in ("outbound_cgroups", "exclude_cgroups"):
        for index, text in enumerate(getattr(capture, key)):
            if CGROUPS.fullmatch(text) is None:
                wrong = f"{quoted(text)} is not the path of a cgroup such as system.slice/cron.service"
                fields.wrong(("capture", key, index), wrong)
    for key in ("inbound_interfaces", "reroute_interfaces", "exclude_interfaces"):
        for index, text in enumerate(getattr(capture, key)):
            if text == "*" and key == "inbound_interfaces":
                continue
            if INTERFACES.fullmatch(text) is None or text == "lo":
                wrong = f"{quoted(text)} is not an interface such as docker0, or the beginning of some such as veth*"
                fields.wrong(("capture", key, index), wrong)
    paths = {
        ("admin", "socket"): admin.socket,
        ("mesh", "directory"): settings.mesh.directory,
        ("mesh", "resolv_conf"): settings.mesh.resolv_conf,
        ("mesh", "hosts_file"): settings.mesh.hosts_file,
        ("identity", "certificate"): settings.identity.certificate,
        ("identity", "key"): settings.identity.key,
        ("identity", "bundle"): settings.identity.bundle,
    }
    for path, text in paths.items():
        if not text or "\0" in text:
            fields.wrong(path, f"{quoted(text)} is not a path")
    return fields.problems


def _check_truthful(fields: Fields, settings: Settings) -> None:
    where = ("capture", "truthful_connect")
    if settings.proxy.workers > 1:
        wrong = "cannot be true while proxy.workers is above 1"
        fields.wrong(where, wrong, "one process holds all connections: write workers = 1, or leave it false")
    try:
        settings.refusal_marks()
    except ValueError:
        fields.wrong(where, "needs two bits that proxy.mark and proxy.local_mark leave free")


_SHORTEST_PROOF = 0.1  # seconds; each is a connection in each family

_OF_PORTS = (
    "inbound_ports",
    "exclude_inbound_ports",
    "outbound_ports",
    "exclude_outbound_ports",
    "loopback_ports",
    "exclude_udp_ports",
)


def _port_range(fields: Fields, path: Path, text: str) -> None:
    first, dash, last = text.partition("-")
    numbers = [int(part) for part in (first, last if dash else first) if re.fullmatch("[0-9]{1,5}", part)]
    if len(numbers) < 2 or not 1 <= numbers[0] <= numbers[1] <= 65535:
        fields.wrong(path, f"{quoted(text)} is not a port such as 8080 or a range such as 8000-8100")


@dataclass(slots=True)
class _Sources:
    text: str
    file: str
    table: Table
    variables: dict[Path, str] = field(default_factory=dict)  # section and key: the variable that says it

    def error(self, problem: Problem) -> ConfigError:
        text = f"{in_words(problem.path)}: {problem.text}"
        for path, variable in self.variables.items():
            if path == problem.path[:2] or (path[:1] == problem.path and not _contains(self.table, problem.path)):
                return ConfigError(text, file=variable, suggestion=problem.suggestion or _default(path, variable))
        hint = problem.suggestion or _default(problem.path)
        return ConfigError(text, file=self.file, line=self._line(problem.path), suggestion=hint)

    def origin(self, path: tuple[str, str]) -> Origin:
        if path in self.variables:
            return Origin("env", self.variables[path])
        if _contains(self.table, path):
            return Origin("file", f"{self.file}:{self._line(path)}")
        return Origin("default")

    def _line(self, path: Path) -> int:
        """Where the statement begins that sets `path`; 0 if the file does not. tomllib keeps no positions.

        The beginning of a file up to a statement is TOML too, and does not have the key yet. Only lines that hold the
        key's name are tried; a name spelt with escapes gets the line of its section.
        """
        path = path[:2]
        if not _contains(self.table, path):
            return 0
        lines = self.text.split("\n")
        found = 0
        for number, line in enumerate(lines, start=1):
            if str(path[-1]) not in line:
                continue
            try:
                before = tomllib.loads("\n".join([*lines[: number - 1], ""]))
            except ValueError:
                continue  # in the middle of a statement
            if _contains(before, path):
                break
            found = number
        return found or (self._line(path[:-1]) if len(path) > 1 else 0)


def _default(path: Path, variable: str = "") -> str:
    """How to write the default of the setting at `path`: in the file, or in the variable if there is one."""
    default = _value(Settings(), path)
    if variable:
        text = ",".join(default) if isinstance(default, tuple) else default
        text = json.dumps(text) if isinstance(text, bool) else text
        return f"set {variable}={text}, the default, or unset it"
    return f"write {path[1]} = {json.dumps(default)}, the default"  # a JSON string, number or list is TOML


def _value(settings: Settings, path: Path) -> object:
    section, key, *_ = map(str, path)
    return getattr(getattr(settings, section), key)


def _contains(table: object, path: Path) -> bool:
    for step in path:
        if not isinstance(table, dict) or step not in table:
            return False
        table = table[step]
    return True


def _keys() -> dict[str, dict[str, inspect.Type]]:
    """Section, key, type."""
    settings = inspect.type_info(Settings)
    assert isinstance(settings, inspect.StructType)
    sections = {section.encode_name: section.type for section in settings.fields}
    return {
        name: {key.encode_name: key.type for key in section.fields}
        for name, section in sections.items()
        if isinstance(section, inspect.StructType)
    }


KEYS = _keys()
