"""The tables of iptables in both families: rules as text, whoever brings them to the kernel.

`iptables` and `legacy` are two such backends, one for each kind of tables a kernel may have. A speaker takes the words
of iptables-restore --noflush and gives those of iptables-save: the binaries (iptables_binaries.py) or python-iptables
(python_iptables.py). One table of one family is committed at a time: mangle, nat, filter of IPv4, then those of IPv6;
when one is refused those before it are put back. A crash between two leaves each table whole, old or new.
"""

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal, Protocol

import msgspec
from pyroute2.netlink.nfnetlink.nftsocket import NFPROTO_IPV4, NFPROTO_IPV6

from meshnet.errors import CommandError
from meshnet_init.backends import Counted, Installed, Lack, modprobe
from meshnet_init.backends.cgroups import without_missing
from meshnet_init.backends.nft import drop_empty_iptables, nat_refused
from meshnet_init.backends.nft_tables import nft_chains
from meshnet_init.foreign import standing_ahead
from meshnet_init.kind import Answer, lacking, samples
from meshnet_init.render import (
    BUILT_IN,
    TABLES,
    chains_of,
    insert_jump,
    iptables_table,
    iptables_words,
    jump,
    parts_of,
    read_iptables_rule,
)
from meshnet_init.rule import CHAINS, NAT_CHAINS, PLACES, Chain, Plan, Rule, Table, drain_set

Kind = Literal["nft", "legacy"]
IpFamily = Literal["ipv4", "ipv6"]
FAMILIES: tuple[IpFamily, ...] = ("ipv4", "ipv6")

_PROBE = "MESHNET_PROBE"  # a chain that nothing leads to
_INCOMPATIBLE = "is incompatible, use 'nft' tool"
_SAVED_RULE = re.compile(r"\[(\d+):(\d+)\] -A (\S+) (.*)")


class Speaker(Protocol):
    """For one family. Raises CommandError, and then nothing has changed."""

    def lack(self) -> Lack:
        """What it cannot speak without, whatever the kernel has."""

    def save(self, table: Table) -> str:
        """That table, as `iptables-save -c -t TABLE` prints it."""

    def restore(self, text: str) -> None:
        """Commits it, as `iptables-restore --noflush` does."""


class IptablesBackend:
    """Our chains in the tables of both families, in one kind of tables.

    Each look and each change is a `session` with the speakers; with True nobody else writes until it is over.
    """

    def __init__(
        self,
        name: str,
        kind: Kind,
        speakers: dict[IpFamily, Speaker],
        session: Callable[[bool], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.name = name
        self._session = session
        self._tables = [
            _Table(family, table, kind, speaker) for family, speaker in speakers.items() for table in TABLES
        ]

    def unavailable(self, plan: Plan) -> Lack:
        """In each table a chain that nothing leads to is made, and taken away again."""
        plan = without_missing(plan)
        with self._session(True):
            lacks = [lack for table in self._tables if (lack := table.unavailable(plan))]
        whys, fixes = dict.fromkeys(lack.why for lack in lacks), dict.fromkeys(lack.fix for lack in lacks if lack.fix)
        return Lack("; ".join(whys), " && ".join(fixes))

    def installed(self) -> Installed | None:
        with self._session(False):
            states = [(table.family, table.read()) for table in self._tables if table.exists()]
        present = [(family, state) for family, state in states if state.present()]
        if not present:
            return None
        captured = {family for family, state in present if not state.drains()}
        rules, problems = [], []
        for family, state in present:
            # Left by a change that took IPv6 out: connections hang on it, the plan does not.
            if family == "ipv6" and captured == {"ipv4"}:
                continue
            rules += state.rules
            problems += [f"{family}: {problem}" for problem in state.problems()]
        ipv6 = any(family == "ipv6" for family, _ in present)
        rules.sort(key=lambda counted: _order(counted.rule))
        return Installed(backend=self.name, rules=tuple(rules), ipv6=ipv6, problems=tuple(problems))

    def is_used_by_others(self) -> bool:
        """Whether the nat table of either family has rules that are not ours."""
        nat = [table for table in self._tables if table.name == "nat"]
        with self._session(False):
            return any(table.exists() and table.read().has_others() for table in nat)

    def expected(self, plan: Plan) -> tuple[Rule, ...]:
        plan = without_missing(plan)
        rules = (*plan.of_family("ipv4"), *(plan.of_family("ipv6") if plan.ipv6 else ()))
        return tuple(sorted(rules, key=_order))

    def apply(self, plan: Plan) -> None:
        with self._session(True):
            self._apply(without_missing(plan))

    def delete(self) -> None:
        with self._session(True):
            for table in reversed(self._tables):
                if table.exists() and (state := table.read()).present():
                    table.restore(state.deletion())
                    table.drop_if_empty()

    def sweep(self) -> None:
        with self._session(False):
            left = [table for table in self._tables if table.has_probe()]
        if left:
            with self._session(True):
                for table in left:
                    table.drop_probe()

    def _apply(self, plan: Plan) -> None:
        written: list[tuple[_Table, _State]] = []
        six = self._without_ipv6() if not plan.ipv6 else plan
        for table in self._tables:
            wanted = plan if table.family == "ipv4" else six
            if wanted is None:
                continue
            chains = [chain for chain in chains_of(wanted) if PLACES[chain].table == table.name]
            before = table.read() if chains or table.exists() else _State()
            if not chains and not before.present():
                continue
            try:
                if chains:
                    text = iptables_table(wanted, table.family, table.name, changes=before.changes(chains))
                    table.restore(text)
                else:
                    table.restore(before.deletion())
                    table.drop_if_empty()
            except CommandError:
                for done, state in reversed(written):
                    done.put_back(state)
                raise
            written.append((table, before))

    def _without_ipv6(self) -> Plan | None:
        """Nothing new is captured there, and nothing that was is cut; None where nothing has to be done for that."""
        states = [table.read() for table in self._tables if table.family == "ipv6" and table.exists()]
        if all(state.drains() or not state.present() for state in states):
            return None
        rules = [counted.rule for state in states for counted in state.rules]
        return drain_set({rule.redirect for rule in rules if rule.redirect}, rules)


def _order(rule: Rule) -> tuple[str, int]:
    return rule.family, CHAINS.index(rule.chain)


class _State(msgspec.Struct):
    """What one table of one family holds of ours. `lines` are the rules of our chains as iptables-save prints them."""

    table: Table = "nat"
    chains: list[Chain] = []
    jumps: list[str] = []  # rules of other chains that lead to ours, without their command
    rules: list[Counted] = []
    lines: list[str] = []
    foreign: list[str] = []
    others: dict[str, list[str]] = {}  # the rules of other chains, jumps to ours among them

    def present(self) -> bool:
        return bool(self.chains or self.jumps)

    def has_others(self) -> bool:
        """Whether there are rules that have nothing to do with ours."""
        return sum(map(len, self.others.values())) > len(self.jumps)

    def drains(self) -> bool:
        return bool(self.rules) and all(counted.rule.keeps() for counted in self.rules)

    def problems(self) -> list[str]:
        needed = self._needed()
        unhung = [chain for chain in needed if jump(chain) not in self.jumps]
        missing = [f"{PLACES[chain].hook} does not jump to {chain}" for chain in unhung]
        extra = [f"jump that is not in the plan: {line}" for line in self._extra_jumps(needed)]
        late = [f"ahead of {chain} in {PLACES[chain].hook}: {line}" for chain in needed for line in self._ahead(chain)]
        return missing + late + extra + [f"rule that is not meshnet's: {line}" for line in self.foreign]

    def changes(self, chains: Sequence[Chain]) -> list[str]:
        """The commands that leave each built-in chain with one jump to each of `chains`, and ours with no other.

        One that has others' rules ahead of it is put first again: kube-proxy, for one, puts its own there.
        """
        placed = [chain for chain in chains if self.jumps.count(jump(chain)) == 1 and not self._ahead(chain)]
        kept = [jump(chain) for chain in placed]
        gone = [chain for chain in self.chains if chain not in chains]
        unhung = [f"-D {line}" for line in self.jumps if line not in kept]
        inserts = [insert_jump(chain) for chain in chains if chain not in placed]
        return [*unhung, *inserts, *(f"-F {chain}" for chain in gone), *(f"-X {chain}" for chain in gone)]

    def deletion(self) -> str:
        chains = [f":{chain} - [0:0]" for chain in self.chains]
        lines = [*chains, *(f"-D {line}" for line in self.jumps), *(f"-X {chain}" for chain in self.chains)]
        return self.commit(lines)

    def commit(self, lines: Iterable[str]) -> str:
        return "\n".join([f"*{self.table}", *lines, "COMMIT"]) + "\n"

    def _ahead(self, chain: Chain) -> tuple[str, ...]:
        # The guard redirects nothing: who stands ahead of it in a filter table takes no connection away from the proxy.
        return () if self.table == "filter" else standing_ahead(self.others, chain)

    def _needed(self) -> Sequence[Chain]:
        return NAT_CHAINS if self.table == "nat" else self.chains

    def _extra_jumps(self, needed: Iterable[Chain]) -> list[str]:
        extra = list(self.jumps)
        for chain in needed:
            if jump(chain) in extra:
                extra.remove(jump(chain))
        return extra


class _Table:
    """One of one family."""

    def __init__(self, family: IpFamily, name: Table, kind: Kind, speaker: Speaker) -> None:
        self.family = family
        self.name = name
        self._kind = kind
        self._speaker = speaker
        self._protocol = NFPROTO_IPV4 if family == "ipv4" else NFPROTO_IPV6

    def exists(self) -> bool:
        """Whether there can be rules of ours to read, without making the table as iptables would."""
        if self._kind == "nft":
            return any(chain.name in CHAINS for chain in nft_chains(self._protocol, self.name))
        names = "ip_tables_names" if self.family == "ipv4" else "ip6_tables_names"
        try:
            return self.name in Path("/proc/thread-self/net", names).read_text().split()
        except (FileNotFoundError, PermissionError):  # no such tables, or not root: then they were not written either
            return False

    def read(self) -> _State:
        state = _State(table=self.name)
        if self._kind == "legacy" and not self.exists():
            return state
        for line in self._speaker.save(self.name).splitlines():
            if _INCOMPATIBLE in line:
                raise CommandError(
                    f"iptables cannot read its own {self.family} {self.name} table",
                    why="other software has put rules into it that only nft understands",
                    fix="use --backend nft",
                )
            if line.startswith(":"):
                state.chains += [chain for chain in CHAINS if line.startswith(f":{chain} ")]
            elif match := _SAVED_RULE.fullmatch(line):
                self._add(state, int(match[1]), int(match[2]), match[3], match[4])
        return state

    def restore(self, text: str) -> None:
        self._speaker.restore(text)

    def unavailable(self, plan: Plan) -> Lack:
        """What the kernel lacks for what `plan` has for this table."""
        of_family = plan.of_family(self.family) if plan.ipv6 or self.family == "ipv4" else ()
        rules = [rule for rule in of_family if PLACES[rule.chain].table == self.name]
        if rules and (unable := self._speaker.lack()):
            return unable
        lack = lacking(self._answers(samples(rules, parts_of))) if rules else None
        if lack is None:
            return Lack()
        command = "iptables" if self.family == "ipv4" else "ip6tables"
        said = f"{command} takes no {', '.join(lack.parts)}: {lack.said}"
        return Lack(said, modprobe(module for part in lack.parts for module in self._modules(part)))

    def _modules(self, part: str) -> Iterator[str]:
        """Those that have one of `parts_of`, or `-t TABLE`, by the names that the kernel asks for them by."""
        option, name = part.split()
        if option == "-t":
            of_legacy = f"{'iptable' if self.family == 'ipv4' else 'ip6table'}_{name}"
            of_nft = "nft_chain_nat" if name == "nat" else "nf_tables"
            yield of_nft if self._kind == "nft" else of_legacy
        elif part not in BUILT_IN:
            if self._kind == "nft":
                yield "nft_compat"  # by which nf_tables has what x_tables has
            yield f"{'ipt' if self.family == 'ipv4' else 'ip6t'}_{name}"  # xt_find_target of x_tables.c

    def _answers(self, rules: Sequence[Rule]) -> list[Answer]:
        """Of the table, and of the rules if it was taken; those are told apart by halves."""
        # By a chain that nothing leads to iptables-nft does not learn of it.
        if self._kind == "nft" and self.name == "nat" and (said := nat_refused(self._protocol)):
            return [Answer({"-t nat"}, said)]
        if not (said := self._refuses(rules)):
            return [Answer(parts_of(rule)) for rule in rules]
        if bare := self._refuses(()):
            return [Answer({f"-t {self.name}"}, bare)]
        return list(self._halved(rules, said))

    def _halved(self, rules: Sequence[Rule], said: str) -> Iterator[Answer]:
        if not said or len(rules) == 1:
            yield from (Answer(parts_of(rule), said) for rule in rules)
            return
        middle = len(rules) // 2
        for half in (rules[:middle], rules[middle:]):
            yield from self._halved(half, self._refuses(half))

    def _refuses(self, rules: Sequence[Rule]) -> str:
        made = [f":{_PROBE} - [0:0]", *(f"-A {_PROBE} {' '.join(iptables_words(rule))}" for rule in rules)]
        try:
            self.restore(_State(table=self.name).commit(made))
        except CommandError as error:
            if error.code in (5, 6):  # no right to, or somebody else writes: that says nothing about the backend
                raise
            return error.why
        # Not in the same commit: of what cancels itself out neither iptables nor libiptc tells the kernel.
        self.drop_probe()
        return ""

    def has_probe(self) -> bool:
        """Whether a trial is under way here, or was when it was killed."""
        if self._kind == "nft":
            return any(chain.name == _PROBE for chain in nft_chains(self._protocol, self.name))
        return self.exists() and f"\n:{_PROBE} " in self._speaker.save(self.name)

    def drop_probe(self) -> None:
        self.restore(_State(table=self.name).commit([f":{_PROBE} - [0:0]", f"-X {_PROBE}"]))
        self.drop_if_empty()

    def put_back(self, before: _State) -> None:
        """Undoes a `restore`."""
        now = self.read()
        if not before.present():
            self.restore(now.deletion())
            self.drop_if_empty()
            return
        # Those that were there stay where they are: others' rules may stand behind them.
        added, lost = Counter(now.jumps) - Counter(before.jumps), Counter(before.jumps) - Counter(now.jumps)
        jumps = [f"-D {line}" for line in added.elements()]
        jumps += [f"-I {line.replace(' ', ' 1 ', 1)}" for line in lost.elements()]
        gone = [f"-X {chain}" for chain in now.chains if chain not in before.chains]
        chains = dict.fromkeys([*now.chains, *before.chains])
        self.restore(now.commit([*(f":{chain} - [0:0]" for chain in chains), *jumps, *before.lines, *gone]))

    def drop_if_empty(self) -> None:
        if self._kind == "nft":
            drop_empty_iptables(self._protocol, self.name)

    def _add(self, state: _State, packets: int, size: int, chain_name: str, text: str) -> None:
        try:
            words = shlex.split(text)
        except ValueError:  # a chain or a set of others with a quotation mark in its name
            words = text.split()
        chain = next((chain for chain in CHAINS if chain == chain_name), None)
        if chain is None:
            state.others.setdefault(chain_name, []).append(text)
            if words[-1] in CHAINS:
                state.jumps.append(f"{chain_name} {text}")
            return
        state.lines.append(f"-A {chain} {text}")
        rule = read_iptables_rule(chain, self.family, words)
        if rule is None:
            state.foreign.append(f"-A {chain} {text}")
        else:
            state.rules.append(Counted(rule, packets, size))
