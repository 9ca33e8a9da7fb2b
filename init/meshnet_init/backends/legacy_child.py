"""Reads and writes one family's legacy tables through python-iptables, in the words of iptables-save and -restore.

A program of its own: libxtables keeps the first family it was used for, and calls exit when it meets what it does not
know (python-iptables 1.2.0). Who starts it holds the xtables lock, which python-iptables does not take, so it ends with
that one.

    legacy_child.py ipv4|ipv6|works

A line of JSON in, a line of JSON out: {"restore": TEXT} is answered by {"text": ""}, {"save": TABLE} by {"text": TEXT},
either by {"error": TEXT}, and then nothing has changed. With `works` it takes no line, and ends with code 0 where
python-iptables can be used at all.
"""

import ctypes
import ctypes.util
import importlib
import ipaddress
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_IFNAMSIZ = 16  # linux/if.h
_BARE = re.compile(r"""[^\s"'\\]+""")


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if sys.argv[1] == "works":
        _load_no_modules()
        _need_options(_python_iptables())
        return
    iptc = _python_iptables()
    kinds = (iptc.Table, iptc.Rule) if sys.argv[1] == "ipv4" else (iptc.Table6, iptc.Rule6)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if "restore" in asked:
                name = asked["restore"].partition("\n")[0].removeprefix("*")
                Table(iptc, *kinds, name).restore(asked["restore"])
                answer = {"text": ""}
            else:
                answer = {"text": "\n".join(Table(iptc, *kinds, asked["save"]).save())}
        except (iptc.IPTCError, iptc.XTablesError, ValueError) as error:
            answer = {"error": _said(error)}
        print(json.dumps(answer), flush=True)


def _load_no_modules() -> None:
    """It has the kernel load its own, which whoever only asks does not want; where it sees no list, it does not."""
    exists = os.path.exists
    os.path.exists = lambda path: path != "/proc/modules" and exists(path)


def _need_options(iptc: Any) -> None:
    """To one that does not know how libxtables lists them only the first of several is known: 1.2.0 with 1.8.11's."""
    iptc.Rule().create_match("addrtype").set_parameter("dst-type", "LOCAL")


def _python_iptables() -> Any:
    """Imported in a fifth of the time: of what it does for that, most is of no use."""
    sys.modules["distutils"] = None  # type: ignore[assignment] # which is how an import fails; it does without
    find = ctypes.util.find_library
    # Its own module is beside it, where it looks last: before that it would have gcc and ld look for it, four times.
    ctypes.util.find_library = lambda name: None if "xtwrapper" in name else find(name)
    return importlib.import_module("iptc")


class Table:
    """One as it was when this was made, until `restore`."""

    def __init__(self, iptc: Any, table_kind: Any, rule_kind: Any, name: str) -> None:  # python-iptables has no types
        self._iptc = iptc
        self._rule_kind = rule_kind
        self._table = table_kind(name)
        self._table.autocommit = False
        self._table.refresh()

    def save(self) -> Iterator[str]:
        """As `iptables-save -c`, but for what says nothing."""
        chains = list(self._table.chains)
        for chain in chains:
            yield f":{chain.name} {'ACCEPT' if chain.is_builtin() else '-'} [0:0]"
        for chain in chains:
            for rule in chain.rules:
                packets, size = rule.get_counters()
                yield f"[{packets}:{size}] -A {chain.name} {_line(words_of(rule))}"

    def restore(self, text: str) -> None:
        """What `iptables-restore --noflush` makes of these lines, all at once. Raises ValueError for other commands."""
        for line in text.splitlines():
            if line and line[0] not in "*#" and line != "COMMIT":
                self._obey(line)
        self._table.commit()

    def _obey(self, line: str) -> None:
        if line.startswith(":"):
            self._begin(line[1:].split()[0])
            return
        command, name, *words = shlex.split(line)
        chain = self._iptc.Chain(self._table, name)
        match command:
            case "-A":
                chain.append_rule(self._rule(words))
            case "-I":
                chain.insert_rule(self._rule(words[1:]), int(words[0]) - 1)
            case "-D":
                chain.delete_rule(_found(chain, words))
            case "-F":
                chain.flush()
            case "-X":
                self._table.delete_chain(name)
            case _:
                raise ValueError(f"unknown command: {line}")

    def _begin(self, name: str) -> None:
        if self._table.is_chain(name):
            self._iptc.Chain(self._table, name).flush()
        else:
            self._table.create_chain(name)

    def _rule(self, words: list[str]) -> Any:
        """From words as `meshnet_init.render.iptables_words` writes them."""
        rule = self._rule_kind()
        words, (target, *values) = words[: words.index("-j")], words[words.index("-j") + 1 :]
        part: Any = None
        negated = ""
        while words:
            word = words.pop(0)
            match word:
                case "!":
                    negated = "!"
                    continue
                case "-s":
                    rule.src = words.pop(0)
                case "-d":
                    rule.dst = words.pop(0)
                case "-i":
                    rule.in_interface = words[0]
                    _compare_whole(rule, "iniface_mask", words.pop(0))
                case "-o":
                    rule.out_interface = words[0]
                    _compare_whole(rule, "outiface_mask", words.pop(0))
                case "-p":
                    rule.protocol = words.pop(0)
                case "-m":
                    part = rule.create_match(words.pop(0))
                case _:
                    several = []
                    while words and not words[0].startswith(("-", "!")):
                        several.append(words.pop(0))
                    value = several if len(several) > 1 else negated + several[0]
                    part.set_parameter(word.removeprefix("--"), value)
            negated = ""
        made = self._iptc.Target(rule, target)
        while values:
            name = values.pop(0).removeprefix("--")
            made.set_parameter(name, values.pop(0) if values and not values[0].startswith("--") else "")
        rule.target = made
        return rule


def _compare_whole(rule: Any, mask: str, name: str) -> None:
    """For IPv6 python-iptables 1.2.0 has the kernel compare one bit of each letter: `eth` was `veth7`, too."""
    address = rule.entry.ipv6 if hasattr(rule.entry, "ipv6") else rule.entry.ip
    compared = len(name) - 1 if name.endswith("+") else len(name) + 1
    setattr(address, mask, (b"\xff" * compared).ljust(_IFNAMSIZ, b"\0"))


def _found(chain: Any, words: list[str]) -> Any:
    for rule in chain.rules:
        if sorted(words_of(rule)) == sorted(words):
            return rule
    raise ValueError(f"{chain.name} has no rule {shlex.join(words)}")


def words_of(rule: Any) -> list[str]:
    """A rule as iptables-save prints it, in an order of its own."""
    words: list[str] = []
    for option, value in (("-s", rule.src), ("-d", rule.dst)):
        negated, text = ["!"] if value.startswith("!") else [], value.removeprefix("!")
        try:
            network = ipaddress.ip_network(text, strict=False)
        except ValueError:  # others' masks need not be prefixes
            words += [*negated, option, text]
            continue
        if network.prefixlen:
            words += [*negated, option, str(network)]
    for option, value in (("-i", rule.in_interface), ("-o", rule.out_interface)):
        if value:
            words += [*(["!"] if value.startswith("!") else []), option, value.removeprefix("!")]
    if rule.protocol not in ("ip", "ipv6", "0", "all"):
        words += ["-p", rule.protocol]
    for match in rule.matches:
        words += ["-m", match.name, *_parameters(match)]
    return [*words, "-j", rule.target.name, *_parameters(rule.target)]


def _line(words: Iterable[str]) -> str:
    """What shlex.split takes apart again, and quoted no more than iptables-save does: not `[fd00::1]:80`."""
    return " ".join(word if _BARE.fullmatch(word) else shlex.quote(word) for word in words)


def _parameters(part: Any) -> Iterator[str]:
    for name, values in part.get_all_parameters().items():
        if values and values[0] == "!":
            yield "!"
            values = values[1:]
        yield f"--{name}"
        yield from values


def _said(error: BaseException) -> str:
    return str(error).replace("b'", "").rstrip("'")


if __name__ == "__main__":
    main()
