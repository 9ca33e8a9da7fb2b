"""One keeper's life: it puts the rules in, looks whether they are as planned, and repairs what others have changed.

Rules vanish when another program flushes the tables, and others come in their way (istio#61182, istio#56729, kuma PR
16766). A repair is `apply`: one step, and open connections live on. When the sidecar dies, `capture.fail` decides.
"""

import logging
import math
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Literal

import msgspec

from meshnet.decide.repairs import InboundPace, RepairPace
from meshnet.errors import CommandError, ConfigError
from meshnet.model.canary import FAMILIES, PROOF_PORT, IpFamily
from meshnet.model.capture import KeeperReport, Proof, Repair, StandDown, TakeUp
from meshnet.model.duration import parse_duration
from meshnet.model.settings import Settings
from meshnet.proxy.notify import Notifier
from meshnet_init.apply import apply_plan, drift, in_kernel
from meshnet_init.backends import Backend, Installed
from meshnet_init.canary import ask_the_proxy
from meshnet_init.choose import choose_for, every_backend, kinds_of
from meshnet_init.host import host_facts
from meshnet_init.inbound_canary import fly_in
from meshnet_init.keep.door import Door
from meshnet_init.keep.guard import Guard
from meshnet_init.keep.line import SidecarLine
from meshnet_init.keep.news import RulesNews
from meshnet_init.keep.way_in import captured_ways_in, need_way_in
from meshnet_init.kind import Kind
from meshnet_init.plan import make_plan
from meshnet_init.routing import installed_routing
from meshnet_init.rule import Plan, Rule
from meshnet_init.sidecar import misfits

_log = logging.getLogger("meshnet.keeper")

_NO_INTERVAL = 30.0  # seconds between looks where the settings want no proof
_SETTLE, _SETTLED_BY = 0.2, 2.0  # seconds of quiet after a change of the rules, and how long that is waited for
_GAP = 1.0  # seconds between looks, however often others change their own rules
_TRIES, _PATIENCE = 3, 1.0  # canaries until one is lost, and seconds for each: meanwhile nothing is repaired
_MOST_NAMED = 3  # of those who have changed rules since the last repair
_KNOCK = 0.2  # seconds between tries to reach a sidecar that is gone


class Keeper:
    """Used from the main thread. `read_settings` raises ConfigError; then what was read before stays in force.

    So it does when settings would newly capture one of the ports that `ways_in` names.
    """

    def __init__(self, read_settings: Callable[[], Settings], ways_in: Callable[[], Collection[int]]) -> None:
        self._read_settings = read_settings
        self._ways_in = ways_in
        self._settings = read_settings()
        self._plan = make_plan(self._settings, host_facts())
        self._backend, self._kinds = _chosen(self._settings, self._plan)
        self._line: SidecarLine | None = None
        self._guard = Guard()
        self._unguarded = ""
        self._pace = RepairPace()
        self._since = _now()
        self._looked_at = ""
        self._has_held = False  # they have been as planned since we began, or were taken up
        self._ever_held = False
        self._is_open = False  # connections go direct, for want of a sidecar
        self._stood_down = False
        self._was_there = False  # a sidecar, at any time
        self._came_back = False  # and its settings may be others
        self._suspects: list[str] = []  # who has changed rules since the last repair
        self._differences: Sequence[str] = ()
        self._proofs: dict[IpFamily, Proof] = {}
        self._inbound: tuple[Proof, ...] = ()
        self._inbound_pace = InboundPace()
        self._repairs = 0
        self._last_repair: Repair | None = None
        self._problem = ""
        self._stale = ""  # why what is in force is not what the file asks for
        self._found: Plan | None = None  # the rules that we began beside, and keep instead of those of the file
        self._last_look = self._next_look = 0.0
        self._ending = False
        self._reread = False
        self._woken, self._wake = socket.socketpair()
        for sock in (self._woken, self._wake):
            sock.setblocking(False)

    def run(self) -> None:
        """Until SIGTERM or SIGINT; the rules stay. SIGHUP reads the settings again. Raises CommandError."""
        with ExitStack() as stack:
            self._door = stack.enter_context(Door(self._wake_up))
            stack.enter_context(self._guard)
            self._news = _news(stack)
            notifier = Notifier.from_environment()
            if notifier is not None and not stack.enter_context(notifier).connect():
                notifier = None
            signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, self._on_signal)
            ready = ["READY=1"]
            by: list[str] = []
            while not self._ending:
                self._obey()
                self._mind_the_sidecar()
                self._obey()
                if time.monotonic() >= self._next_look:
                    self._look(by)
                    by = []
                self._door.report = self._report()
                if notifier is not None:
                    rules = f"{len(self._plan.rules)} rules by {self._backend.name}"
                    notifier.tell(*ready, f"STATUS={self._state()}, {rules}, {self._repairs} repairs")
                    ready = []
                by += [name for name in self._wait(notifier) if name not in by]
            _log.info("the keeper ends; the rules stay as they are")

    def _look(self, by: Sequence[str]) -> None:
        """`by`: the programs that have changed rules since the last look, as far as they are known."""
        self._last_look = time.monotonic()
        self._next_look = self._last_look + self._interval()
        self._looked_at = _now()
        if self._stood_down:
            self._proofs, self._inbound = {}, ()
            return
        try:
            if self._found is None:
                self._plan_again()
            if not self._is_open:
                self._hold(by)
                self._stand_guard()
            self._problem = ""
        except (CommandError, ConfigError, OSError) as error:
            self._fail(error)
        self._prove()
        self._prove_inbound()

    def _plan_again(self) -> None:
        """What the host has may be more than when the backend was chosen: IPv6, a cgroup."""
        self._plan = make_plan(self._settings, host_facts())
        if not kinds_of(self._plan) <= self._kinds:
            self._backend, self._kinds = _chosen(self._settings, self._plan)
            self._has_held = False

    def _hold(self, by: Sequence[str]) -> None:
        found = in_kernel()
        lines = drift(self._plan, self._backend, found)
        now = time.monotonic()
        if not lines:
            self._has_held, self._ever_held, self._differences = True, True, ()
        elif not self._has_held:
            self._need_fit()
            if self._keeps_what_is_there(found):
                return
            applied = apply_plan(self._plan, self._backend)
            self._has_held, self._ever_held, self._differences = True, True, ()
            self._heard()
            _log.info("%d rules put in by %s", applied.rules, applied.backend)
        elif wait := self._pace.wait(now):
            self._differences = lines
            self._suspects = [*self._suspects, *by][-_MOST_NAMED:]
            self._next_look = min(self._next_look, now + wait)
        else:
            self._repair(lines, by)

    def _stand_guard(self) -> None:
        if not self._settings.capture.strict:
            self._let_go()
            return
        try:
            if self._guard.hold(self._plan):
                self._heard()  # of what we have just done, and of what others may have done meanwhile
                self._next_look = min(self._next_look, self._last_look + _GAP)
            why = ""
        except (CommandError, OSError) as error:
            why = _said(error)
        if why and why != self._unguarded:
            _log.warning("who flushes all rules lets connections pass until they are repaired: %s", why)
        self._unguarded = why

    def _let_go(self) -> None:
        self._guard.let_go()
        self._unguarded = ""

    def _need_fit(self) -> None:
        """Settings may have changed under a sidecar that has not read them: its rules are not taken from it.

        Raises CommandError.
        """
        status = self._line.status() if self._line is not None else None
        if status is not None and (unfit := misfits(self._plan.rules, self._plan.routing, status)):
            raise CommandError(
                "the settings do not fit the sidecar that runs: the rules stay as they are",
                why="; ".join(unfit),
                fix="start it again with these settings: sudo meshnet down && sudo meshnet up",
            )

    def _keeps_what_is_there(self, found: Sequence[tuple[Backend, Installed]]) -> bool:
        """Whether the rules that are in force are kept, for those of the file would capture the way in."""
        try:
            need_way_in(self._plan.rules, _in_force(found), self._ways_in())
        except CommandError as error:
            self._backend, there = next((backend, it) for backend, it in found if not it.draining())
            self._plan = self._found = msgspec.structs.replace(there, routing=installed_routing()).plan()
            self._refuse(error)
            return True
        for port in captured_ways_in(self._plan.rules, self._ways_in()):
            _log.warning("port %d is captured, by which SSH may reach this host", port)
        return False

    def _refuse(self, error: CommandError | ConfigError) -> None:
        self._stale = f"the settings stay as they were: {_said(error)}"
        _log.error("%s", self._stale)

    def _repair(self, lines: Sequence[str], by: Sequence[str]) -> None:
        self._differences = lines
        by = list(dict.fromkeys([*self._suspects, *by, *self._heard()]))[-_MOST_NAMED:]
        self._suspects = []
        apply_plan(self._plan, self._backend)
        self._heard()  # of what we have just done
        now, whom = time.monotonic(), ", ".join(by) or "somebody the kernel does not name"
        self._pace.repaired(now)
        self._differences = ()
        self._repairs += 1
        if not self._pace.is_fight(now):
            self._inbound_pace.at_once()
        self._last_repair = Repair(at=_now(), differences=tuple(lines), by=", ".join(by))
        _log.warning("rules repaired, %s had changed them: %s", whom, "; ".join(lines))
        if self._pace.is_fight(now):
            wait = self._pace.wait(now)
            _log.error("%s changes the rules again and again; the next repair is made in %.0f s", whom, wait)
        self._next_look = now + _GAP  # whoever does it again does it soon

    def _fail(self, error: CommandError | ConfigError | OSError) -> None:
        text = _said(error)
        if text != self._problem:
            _log.error("the rules cannot be kept: %s", text)
        self._problem = text
        self._pace.repaired(time.monotonic())
        self._next_look = time.monotonic() + max(_GAP, self._pace.wait(time.monotonic()))

    def _prove(self) -> None:
        """By canaries that take the way of any application: others' rules may be ahead of ours."""
        for family in FAMILIES:
            proof = self._canary(family)
            before = self._proofs.get(family)
            self._proofs[family] = proof
            lost = proof.result == "not captured"
            if lost != (before is not None and before.result == "not captured"):
                say = _log.error if lost else _log.info
                say("outbound %s: %s: %s", family, proof.result, proof.detail)

    def _prove_inbound(self) -> None:
        """Not at every look: the interface it takes disturbs others."""
        if self._line is None or self._is_open or self._problem or self._differences:
            return
        is_lost = any(proof.result == "not captured" for proof in self._inbound)
        if not (is_lost or self._inbound_pace.is_due(time.monotonic())):
            return
        port = self._settings.proxy.inbound_port
        canaries = fly_in(self._plan, port, self._backend, self._backend.installed(), proxy_runs=True)
        found = tuple(
            Proof(direction="inbound", family=it.family, result=it.status, detail=it.detail) for it in canaries
        )
        if [proof.result for proof in found] != [proof.result for proof in self._inbound]:
            for proof in found:
                say = _log.error if proof.result == "not captured" else _log.info
                say("inbound %s: %s: %s", proof.family, proof.result, proof.detail)
        self._inbound = found
        interval = self._settings.capture.inbound_proof_interval
        self._inbound_pace.proved(time.monotonic(), math.inf if interval == "off" else parse_duration(interval))

    def _canary(self, family: IpFamily) -> Proof:
        def proof(result: Literal["not tried"], detail: str) -> Proof:
            return Proof(direction="outbound", family=family, result=result, detail=detail)

        if self._is_open or self._problem or self._differences:
            return proof("not tried", "the rules are not in force")
        if self._line is None:
            return proof("not tried", "no sidecar runs that could answer")
        for _ in range(_TRIES):
            canary = ask_the_proxy(self._plan, family, PROOF_PORT, _PATIENCE)
            if canary.status != "not captured":
                break
            if self._news is not None and select.select([self._news], [], [], 0)[0]:
                return proof("not tried", "the rules are being changed")  # soon it is known how
        if canary.status == "not captured" and not self._line.is_up():
            return proof("not tried", "the sidecar has just died")
        return Proof(direction="outbound", family=family, result=canary.status, detail=canary.detail)

    def _mind_the_sidecar(self) -> None:
        if self._line is not None and not self._line.is_up():
            self._hang_up()
            opens = self._stood_down or self._settings.capture.fail == "open"
            _log.warning("the sidecar is gone: new connections %s", "go direct" if opens else "are refused")
        if self._line is None:
            try:
                self._line = SidecarLine(self._settings.admin.socket)
            except OSError:
                if self._settings.capture.fail == "open" and not (self._is_open or self._stood_down):
                    self._open()
                return
            _log.info("the sidecar is there")
            # It has read the settings of now, which may be others.
            self._came_back = self._was_there and not self._stood_down
            self._was_there = True
            self._inbound_pace.at_once()
            self._next_look = 0.0
        if self._is_open and (status := self._line.status()) is not None and status.waits_for_rules:
            self._is_open = self._has_held = False
            self._look([])
            if not (self._problem or self._is_open):
                _log.info("the sidecar is ready: connections are captured again")

    def _open(self) -> None:
        """New connections go direct; those that were captured keep their translation, and learn of their end."""
        self._is_open = True
        self._let_go()
        try:
            for backend in (self._backend, *(each for each in every_backend() if each.name != self._backend.name)):
                installed = backend.installed()
                if installed is not None and not installed.draining():
                    backend.apply(installed.drain_set())
        except (CommandError, OSError) as error:
            self._is_open = False
            self._fail(error)
        self._heard()

    def _obey(self) -> None:
        request = self._door.take()
        if isinstance(request, StandDown) and not self._stood_down:
            _log.warning("told to stand down: the rules are left alone until `meshnet up`, `meshnet init` or SIGHUP")
            self._stood_down, self._differences, self._problem = True, (), ""
            self._let_go()
            self._reread = self._came_back = False
        elif isinstance(request, TakeUp):
            self._reread = True
        if self._reread:
            self._reread = self._came_back = False
            self._take_up()
        elif self._came_back:
            self._came_back = False
            self._take_up(stays_open=self._is_open)
        if request is not None:
            self._door.report = self._report()
            self._door.done()

    def _take_up(self, *, stays_open: bool = False) -> None:
        """`stays_open`: until the sidecar that has come back is ready."""
        try:
            settings = self._read_settings()
            plan = make_plan(settings, host_facts())
            before = [*_in_force(in_kernel()), *([self._plan.rules] if self._ever_held else [])]
            need_way_in(plan.rules, before, self._ways_in())
            self._backend, self._kinds = _chosen(settings, plan)
        except (ConfigError, CommandError) as error:
            self._refuse(error)
        else:
            self._stale, self._found = "", None
            if settings.admin.socket != self._settings.admin.socket and self._line is not None:
                self._hang_up()
            self._settings = settings
        self._stood_down = self._has_held = False
        self._is_open = stays_open
        self._pace = RepairPace()
        self._inbound_pace.at_once()
        self._next_look = 0.0

    def _wait(self, notifier: Notifier | None) -> list[str]:
        """Until it is time to look, somebody wakes us, or the rules change: then by whom."""
        until = self._next_look - time.monotonic()
        if self._line is None or self._is_open:
            until = min(until, _KNOCK)
        if notifier is not None:
            until = min(until, notifier.every)
        poll = select.poll()
        for source in (self._woken, self._line, self._news):
            if source is not None:
                poll.register(source.fileno(), select.POLLIN)
        happened = {descriptor for descriptor, _ in poll.poll(max(0.0, until) * 1000)}
        if self._woken.fileno() in happened:
            self._woken.recv(4096)
        if self._news is None or self._news.fileno() not in happened:
            return []
        self._next_look = min(self._next_look, self._last_look + _GAP)
        self._inbound_pace.others_changed_rules()
        return self._settled()

    def _settled(self) -> list[str]:
        """Who has changed rules, once they are done: a reload of a firewall is many transactions."""
        assert self._news is not None
        started = time.monotonic()
        programs = self._news.read()
        while time.monotonic() < started + _SETTLED_BY and select.select([self._news], [], [], _SETTLE)[0]:
            programs += [name for name in self._news.read() if name not in programs]
        return programs

    def _heard(self) -> list[str]:
        """Who has changed rules of late; the next call does not say so again."""
        return self._news.read() if self._news is not None else []

    def _hang_up(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None

    def _interval(self) -> float:
        interval = self._settings.capture.proof_interval
        return _NO_INTERVAL if interval == "off" else parse_duration(interval)

    def _state(self) -> Literal["keeping", "open", "stood down", "failing", "fighting"]:
        if self._stood_down:
            return "stood down"
        if self._problem:
            return "failing"
        if self._is_open:
            return "open"
        return "fighting" if self._pace.is_fight(time.monotonic()) else "keeping"

    def _report(self) -> KeeperReport:
        state, proofs = self._state(), (*self._proofs.values(), *self._inbound)
        lost = any(proof.result == "not captured" for proof in proofs)
        return KeeperReport(
            pid=os.getpid(),
            since=self._since,
            state=state,
            looked_at=self._looked_at,
            interval_seconds=self._interval(),
            backend=self._backend.name,
            fail=self._settings.capture.fail,
            sidecar="gone" if self._line is None else "alive",
            in_place=self._has_held and state in ("keeping", "fighting") and not (lost or self._differences),
            proofs=proofs,
            repairs=self._repairs,
            last_repair=self._last_repair,
            problem=self._problem or "; ".join(self._differences) or self._stale,
            unguarded=self._unguarded,
        )

    def _wake_up(self) -> None:
        try:
            self._wake.send(b"!")
        except BlockingIOError:
            pass  # it is awake

    def _on_signal(self, number: int, _frame: object) -> None:
        if number == signal.SIGHUP:
            self._reread = True
        else:
            self._ending = True


def _chosen(settings: Settings, plan: Plan) -> tuple[Backend, frozenset[Kind]]:
    """And what it was tried for."""
    choice = choose_for(settings, plan)
    for note in choice.notes:
        _log.info("%s", note)
    return choice.backend, kinds_of(plan)


def _in_force(found: Sequence[tuple[Backend, Installed]]) -> list[tuple[Rule, ...]]:
    return [installed.plan().rules for _, installed in found if not installed.draining()]


def _news(stack: ExitStack) -> RulesNews | None:
    try:
        return stack.enter_context(RulesNews())
    except OSError as error:
        _log.warning("the kernel does not tell of changes of the rules (%s): they are looked at by the clock", error)
        return None


def _said(error: CommandError | ConfigError | OSError) -> str:
    if isinstance(error, CommandError):
        return "; ".join(filter(None, (error.what, error.why, error.fix)))
    return str(error)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
