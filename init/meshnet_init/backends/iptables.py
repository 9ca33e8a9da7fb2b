"""The nat table of iptables in both families: its rules as text, whoever brings them to the kernel.

`iptables` and `legacy` are two such backends, one for each kind of tables a kernel may have. A speaker takes the words
of iptables-restore --noflush and gives those of iptables-save: the binaries (iptables_binaries.py) or python-iptables
(python_iptables.py). One table of one family is committed at a time: IPv4 is written first, then IPv6, and when IPv6
is refused IPv4 is put back. A crash between the two leaves each family whole, in its old or its new state.
"""

import re
import shlex
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal, Protocol

import msgspec
from pyroute2.netlink.nfnetlink.nftsocket import NFPROTO_IPV4, NFPROTO_IPV6

from meshnet.errors import CommandError
from meshnet_init.backends import Counted, Installed
from meshnet_init.backends.nft import drop_empty_iptables_nat, nft_chains
from meshnet_init.plan import CHAINS, Chain, Plan, Rule, drain_set
from meshnet_init.render import HOOKS, insert_jump, iptables_text, jump, read_iptables_rule

Kind = Literal["nft", "legacy"]
IpFamily = Literal["ipv4", "ipv6"]
FAMILIES: tuple[IpFamily, ...] = ("ipv4", "ipv6")

_INCOMPATIBLE = "is incompatible, use 'nft' tool"
_SAVED_RULE = re.compile(r"\[(\d+):(\d+)\] -A (\S+) (.*)")


class Speaker(Protocol):
    """For one family. Raises CommandError, and then nothing has changed."""

    def save(self) -> str:
        """The nat table, as `iptables-save -c -t nat` prints it."""

    def restore(self, text: str) -> None:
        """Commits it, as `iptables-restore --noflush` does."""


class IptablesBackend:
    """The chains MESHNET_IN and MESHNET_OUT of the nat table in both families, in one kind of tables.

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
        self._families = tuple(_Table(family, kind, speaker) for family, speaker in speakers.items())

    def unavailable(self) -> str:
        """Tries it for real: one commit that makes a chain with such a rule and takes both away again."""
        table = self._families[0]
        probe = "*nat\n:MESHNET_PROBE - [0:0]\n-A MESHNET_PROBE -p tcp -j REDIRECT --to-ports 1\n"
        try:
            with self._session(True):
                table.restore(probe + "-F MESHNET_PROBE\n-X MESHNET_PROBE\nCOMMIT\n")
        except CommandError as error:
            if error.code in (5, 6):  # no right to, or somebody else writes: that says nothing about the backend
                raise
            return error.why
        table.drop_if_empty()
        return ""

    def installed(self) -> Installed | None:
        with self._session(False):
            states = {table.family: table.read() for table in self._families if table.exists()}
        present = {family: state for family, state in states.items() if state.present()}
        if not present:
            return None
        rules, problems = [], []
        for family, state in present.items():
            # Left by a change that took IPv6 out: connections hang on it, the plan does not.
            if family == "ipv6" and state.drains() and not present.get("ipv4", state).drains():
                continue
            rules += state.rules
            problems += [f"{family}: {problem}" for problem in state.problems()]
        return Installed(backend=self.name, rules=tuple(rules), ipv6="ipv6" in present, problems=tuple(problems))

    def is_used_by_others(self) -> bool:
        """Whether the nat table of either family has rules that are not ours."""
        with self._session(False):
            return any(table.exists() and table.read().others for table in self._families)

    def expected(self, plan: Plan) -> tuple[Rule, ...]:
        rules = (*plan.of_family("ipv4"), *(plan.of_family("ipv6") if plan.ipv6 else ()))
        return tuple(sorted(rules, key=lambda rule: (rule.family, CHAINS.index(rule.chain))))

    def apply(self, plan: Plan) -> None:
        with self._session(True):
            self._apply(plan)

    def delete(self) -> None:
        with self._session(True):
            for table in reversed(self._families):
                if table.exists() and (state := table.read()).present():
                    table.restore(state.deletion())
                    table.drop_if_empty()

    def _apply(self, plan: Plan) -> None:
        written: list[tuple[_Table, _State]] = []
        for table in self._families:
            wanted = plan
            if table.family == "ipv6" and not plan.ipv6:
                # Nothing new is captured there, and nothing that was is cut.
                if not table.exists() or (state := table.read()).drains():
                    continue
                wanted = drain_set(state.redirect_ports())
            before = table.read()
            try:
                table.restore(iptables_text(wanted, table.family, jumps=before.missing_jumps()))
            except CommandError:
                for done, state in written:
                    done.put_back(state)
                raise
            written.append((table, before))


class _State(msgspec.Struct):
    """What one family's nat table holds of ours. `lines` are the rules of our chains as iptables-save prints them."""

    chains: list[Chain] = []
    jumps: list[str] = []  # rules of other chains that lead to ours, without their command
    rules: list[Counted] = []
    lines: list[str] = []
    foreign: list[str] = []
    others: int = 0  # rules of other chains that have nothing to do with ours

    def present(self) -> bool:
        return bool(self.chains or self.jumps)

    def drains(self) -> bool:
        return bool(self.rules) and all(counted.rule.hold for counted in self.rules)

    def redirect_ports(self) -> set[int]:
        return {counted.rule.redirect for counted in self.rules if counted.rule.redirect}

    def problems(self) -> list[str]:
        missing = [f"{HOOKS[chain]} does not jump to {chain}" for chain in CHAINS if jump(chain) not in self.jumps]
        extra = [f"jump that is not in the plan: {line}" for line in self._extra_jumps()]
        return missing + extra + [f"rule that is not meshnet's: {line}" for line in self.foreign]

    def missing_jumps(self) -> list[str]:
        """The commands that leave each built-in chain with one jump to ours."""
        inserts = [insert_jump(chain) for chain in CHAINS if jump(chain) not in self.jumps]
        return inserts + [f"-D {line}" for line in self._extra_jumps()]

    def deletion(self) -> str:
        chains = [f":{chain} - [0:0]" for chain in self.chains]
        return _commit([*chains, *(f"-D {line}" for line in self.jumps), *(f"-X {chain}" for chain in self.chains)])

    def _extra_jumps(self) -> list[str]:
        extra = list(self.jumps)
        for chain in CHAINS:
            if jump(chain) in extra:
                extra.remove(jump(chain))
        return extra


class _Table:
    """One family's nat table."""

    def __init__(self, family: IpFamily, kind: Kind, speaker: Speaker) -> None:
        self.family = family
        self._kind = kind
        self._speaker = speaker
        self._protocol = NFPROTO_IPV4 if family == "ipv4" else NFPROTO_IPV6

    def exists(self) -> bool:
        """Whether there can be rules of ours to read, without making the table as iptables would."""
        if self._kind == "nft":
            return any(name in CHAINS for name, _ in nft_chains(self._protocol, "nat"))
        names = "ip_tables_names" if self.family == "ipv4" else "ip6_tables_names"
        try:
            return "nat" in Path("/proc/thread-self/net", names).read_text().split()
        except (FileNotFoundError, PermissionError):  # no such tables, or not root: then they were not written either
            return False

    def read(self) -> _State:
        state = _State()
        if self._kind == "legacy" and not self.exists():
            return state
        for line in self._speaker.save().splitlines():
            if _INCOMPATIBLE in line:
                raise CommandError(
                    f"iptables cannot read its own {self.family} nat table",
                    why="other software has put rules into it that only nft understands",
                    fix="use --backend nft",
                )
            if line.startswith(":"):
                state.chains += [chain for chain in CHAINS if line.startswith(f":{chain} ")]
            elif match := _SAVED_RULE.fullmatch(line):
                self._add(state, int(match[1]), int(match[2]), match[3], match[4])
        order = {chain: at for at, chain in enumerate(CHAINS)}
        state.rules.sort(key=lambda counted: order[counted.rule.chain])
        return state

    def restore(self, text: str) -> None:
        self._speaker.restore(text)

    def put_back(self, before: _State) -> None:
        """Undoes a `restore`."""
        now = self.read()
        if not before.present():
            self.restore(now.deletion())
            self.drop_if_empty()
            return
        jumps = [f"-D {line}" for line in now.jumps] + [f"-A {line}" for line in before.jumps]
        self.restore(_commit([*(f":{chain} - [0:0]" for chain in CHAINS), *jumps, *before.lines]))

    def drop_if_empty(self) -> None:
        if self._kind == "nft":
            drop_empty_iptables_nat(self._protocol)

    def _add(self, state: _State, packets: int, size: int, chain_name: str, text: str) -> None:
        words = shlex.split(text)
        chain = next((chain for chain in CHAINS if chain == chain_name), None)
        if chain is None:
            if words[-1] in CHAINS:
                state.jumps.append(f"{chain_name} {text}")
            else:
                state.others += 1
            return
        state.lines.append(f"-A {chain} {text}")
        rule = read_iptables_rule(chain, self.family, words)
        if rule is None:
            state.foreign.append(f"-A {chain} {text}")
        else:
            state.rules.append(Counted(rule, packets, size))


def _commit(lines: Iterable[str]) -> str:
    return "\n".join(["*nat", *lines, "COMMIT"]) + "\n"
