"""The sidecar proves again and again that it is in the way of this host's traffic. It needs no right to do so.

- A canary of its own in each family: it comes back to the sidecar only if the rules are in force.
- A look for connections that got past it (bypass.py).
- What the keeper of the rules says, if there is one: the sidecar cannot call itself from elsewhere.
- Who asks for readiness through the rules (visits.py), as a kubelet does, if capture.readiness_port is set.

Rules vanish weeks later (istio#61182, istio#56729): capture that was in place and is gone makes the sidecar not ready.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice

import trio

from meshnet.model.address import Address
from meshnet.model.admin import Family, Sample
from meshnet.model.canary import FAMILIES, OWN_CANARY, PROOF_PORT, IpFamily, greeting
from meshnet.model.capture import CaptureStatus, KeeperReport, Proof, ProofResult
from meshnet.model.connection import Direction
from meshnet.model.duration import parse_duration
from meshnet.model.settings import Settings
from meshnet.model.uncaptured import UncapturedList
from meshnet.net import sockets
from meshnet.net.addresses import LocalAddresses
from meshnet.net.canary import begin_connect
from meshnet.net.keeper import ask_keeper
from meshnet.net.sock_diag import TcpSocket, host_of
from meshnet.proxy.bypass import Bypass
from meshnet.proxy.record import rfc3339
from meshnet.proxy.uncaptured import list_uncaptured
from meshnet.proxy.visits import InboundVisits

_log = logging.getLogger("meshnet.capture")

_PATIENCE = 3.0  # seconds for one canary
_LISTEN = 2.0  # seconds between questions to the keeper
_FIRST = 0.5  # seconds; while capture is not proved it is tried again after pauses that grow up to the interval
_SECOND_LOOK = 0.2  # seconds; the kernel's list is not of one moment, so what got past is seen twice
_EXAMPLES = 5
_DEFINITE: frozenset[ProofResult] = frozenset({"captured", "not captured"})
_FAMILY: dict[int, IpFamily] = {4: "ipv4", 16: "ipv6"}  # by the length of a packed address
_NAMES: dict[IpFamily, str] = {"ipv4": "IPv4", "ipv6": "IPv6"}

Past = frozenset[tuple[Direction, TcpSocket]]


class CaptureProof:
    """`pids`: the sidecar's processes. One of these proves for all of them."""

    def __init__(self, settings: Settings, pids: Callable[[], Iterable[int]]) -> None:
        self._settings = settings
        interval = settings.capture.proof_interval
        self._interval = None if interval == "off" else parse_duration(interval)
        self._required = settings.capture.required
        self._mark = settings.proxy.mark if sockets.can_mark(settings.proxy.mark) else 0
        self._pids = pids
        self._proofs: dict[IpFamily, Proof] = {}
        self._proved: set[IpFamily] = set()  # families whose capture was in place
        self._proved_at = ""
        self._counts: dict[tuple[IpFamily, ProofResult], int] = {}
        self._older: Past = frozenset()  # connections from before capture: nobody's fault
        self._settled = False  # whether those are known
        self._past: Past = frozenset()
        self._taken = False  # the port at which readiness is asked for
        self._not_judged: dict[str, str] = {}
        self._keeper: KeeperReport | None = None
        self._visits = InboundVisits()

    async def run(self) -> None:
        """Until it is cancelled; returns at once where no proof is asked for."""
        if self._interval is None:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen)
            await self._go_on_proving(self._interval)

    async def _go_on_proving(self, interval: float) -> None:
        next_try = _FIRST
        with LocalAddresses() as addresses:
            bypass = Bypass(self._settings, addresses, self._pids)
            while True:
                await self._prove()
                await self._look(bypass)
                await trio.sleep(interval if self.in_place else min(next_try, interval))
                next_try = _FIRST if self.in_place else next_try * 2

    async def _listen(self) -> None:
        """To the keeper, which comes and goes by itself: a question costs nothing beside a proof."""
        while True:
            self._hear(await trio.to_thread.run_sync(ask_keeper))
            self._visits.look()
            await trio.sleep(_LISTEN)

    @property
    def in_place(self) -> bool | None:
        """None while nothing could be proved, for want of a route or of an answer."""
        results = {proof.result for proof in self._proofs.values()} & _DEFINITE
        return "not captured" not in results if results else None

    def came(self, family: IpFamily) -> None:
        """Somebody has come in through the rules to ask for readiness. Where no proof is asked for, none is kept."""
        if self._interval is not None:
            self._visits.came(family)

    @property
    def past(self) -> int:
        """Open connections that should have come through the sidecar, at the last look."""
        return len(self._past)

    async def uncaptured(self) -> UncapturedList:
        """What does not come through the sidecar, and why. Raises OSError where the kernel does not tell."""
        older = {found for _, found in self._older} if self._settled else None
        return await list_uncaptured(self._settings, self._pids, older)

    def captures(self, family: IpFamily) -> bool | None:
        """Whether what leaves in that family was captured when that was last tried; None: not known."""
        proof = self._proofs.get(family)
        return proof.result == "captured" if proof is not None and proof.result in _DEFINITE else None

    def problems(self) -> tuple[str, ...]:
        """Why the sidecar cannot do its work; empty when it can, or when nobody has asked for capture."""
        if self._interval is None:
            return ()
        problems = [
            f"outbound {_NAMES[family]} is not captured: {proof.detail} (sudo meshnet rules verify)"
            for family, proof in self._proofs.items()
            if proof.result == "not captured" and (self._required or family in self._proved)
        ]
        silent = not self._proofs or any(proof.result == "no answer" for proof in self._proofs.values())
        if self._required and not self._proved and silent and not problems:
            problems.append("capture is required, and not proved yet")
        if self._keeper is not None and (self._required or self._proved):
            problems += _problems_of(self._keeper)
        if self._required or self._proved:
            problems += self._inbound_past()
        if self._taken:
            port = self._settings.capture.readiness_port
            problems.append(
                f"somebody else listens at port {port}, capture.readiness_port (ss -ltnp 'sport = :{port}')"
            )
        return tuple(problems)

    def _inbound_past(self) -> Iterator[str]:
        """What came in beside the sidecar tells where no keeper has proved what comes in, as in a pod: who asks for
        readiness proves the rule of that port, and not those of applications.
        """
        reported = self._keeper.proofs if self._keeper is not None else ()
        kept = {it.family for it in reported if it.direction == "inbound" and it.result == "captured"}
        inbound = [each for each in sorted(self._past) if each[0] is Direction.INBOUND]
        if past := [each for each in inbound if _FAMILY[len(each[1].local)] not in kept]:
            many = "1 connection" if len(past) == 1 else f"{len(past)} connections"
            yield (
                f"{many} inbound got past the sidecar: {', '.join(map(_told, past[:_EXAMPLES]))}"
                " (sudo meshnet rules verify; in a pod: restart it)"
            )

    def status(self) -> CaptureStatus | None:
        if self._interval is None:
            return None
        judged = [direction for direction in Direction if direction not in self._not_judged]
        return CaptureStatus(
            in_place=self.in_place,
            required=self._required,
            proofs=(*self._proofs.values(), *self._visits.proofs()),
            visits=self._visits.views(),
            proved_at=self._proved_at,
            interval_seconds=self._interval,
            uncaptured={str(it): sum(direction is it for direction, _ in self._past) for it in judged},
            not_judged={str(direction): why for direction, why in self._not_judged.items()},
            examples=tuple(islice(map(_told, sorted(self._past)), _EXAMPLES)),
            problems=self.problems(),
            keeper=self._keeper,
        )

    def families(self) -> tuple[Family, ...]:
        """Its metrics."""
        return () if self._interval is None else tuple(self._families())

    async def _prove(self) -> None:
        for family in FAMILIES:
            proof = await self._send(family)
            if proof.result == "not captured":
                proof = await self._send(family)  # one packet may be lost
            key = family, proof.result
            self._counts[key] = self._counts.get(key, 0) + 1
            before = self._proofs.get(family)
            if proof.result == "no answer" and before is not None and before.result == "captured":
                continue  # whoever is busy does not answer in time: that says nothing about the rules
            self._proofs[family] = proof
            if proof.result == "captured":
                self._proved.add(family)
            if before is None or before.result != proof.result:
                _tell(proof, was_proved=family in self._proved)
        self._proved_at = rfc3339(time.time())

    async def _send(self, family: IpFamily) -> Proof:
        def proof(result: ProofResult, detail: str) -> Proof:
            return Proof(direction="outbound", family=family, result=result, detail=detail)

        ipv6 = self._settings.capture.ipv6
        if family == "ipv6" and ipv6 in ("off", "reject"):
            return proof("not in the plan", f'capture.ipv6 = "{ipv6}"')
        target = Address(OWN_CANARY[family], PROOF_PORT)
        try:
            sock = begin_connect(target, self._mark)
        except OSError as error:
            return proof("not captured", f"the canary was not let out: {error.strerror}")
        if sock is None:
            return proof("no route", "nothing can leave")
        answer, connected = b"", False
        with trio.socket.from_stdlib_socket(sock) as canary, trio.move_on_after(_PATIENCE):
            try:
                await trio.lowlevel.wait_writable(sock)
                if code := sock.getsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_ERROR):
                    return proof("not captured", f"the canary left by its own way: {os.strerror(code)}")
                connected = True
                while len(answer) < len(greeting(target)) and (data := await canary.recv(256)):
                    answer += data
            except OSError as error:
                return proof("not captured", f"the canary left by its own way: {error.strerror}")
            if answer != greeting(target):
                return proof("not captured", "whoever answered the canary is not the outbound proxy")
            return proof("captured", "the canary came back")
        if connected:
            return proof("no answer", f"the canary was not answered within {_PATIENCE:g} s")
        return proof("not captured", f"the canary did not come back within {_PATIENCE:g} s")

    async def _look(self, bypass: Bypass) -> None:
        self._not_judged = {str(direction): why for direction, why in bypass.scope.not_judged.items()}
        try:
            found = await trio.to_thread.run_sync(bypass.look)
            if self._settled and found - self._older:
                await trio.sleep(_SECOND_LOOK)
                found &= await trio.to_thread.run_sync(bypass.look)
        except OSError as error:
            self._not_judged = {str(direction): f"cannot be looked at: {error.strerror}" for direction in Direction}
            self._past = frozenset()
            return
        if bypass.is_taken and not self._taken:
            port = self._settings.capture.readiness_port
            _log.warning("somebody listens at port %d, capture.readiness_port: he would answer without rules", port)
        self._taken = bypass.is_taken
        if not self._settled:
            self._older, self._settled = found, bool(self._proved)
        self._older &= found
        before, self._past = self._past, found - self._older
        if self._past and not before:
            examples = ", ".join(islice(map(_told, sorted(self._past)), _EXAMPLES))
            _log.warning("%d connections got past the sidecar: %s", len(self._past), examples)
        elif before and not self._past:
            _log.info("no connection is open any more that got past the sidecar")

    def _hear(self, report: KeeperReport | None) -> None:
        before, self._keeper = self._keeper, report
        if report is None:
            if before is not None:
                _log.warning("the keeper of the rules (pid %d) is gone: nobody repairs them", before.pid)
            return
        if before is None or before.pid != report.pid:
            _log.info("a keeper looks after the rules (pid %d, %s)", report.pid, report.backend)
        elif before.state != report.state:
            _log.warning("the keeper of the rules: %s %s", report.state, report.problem)
        last = report.last_repair
        if last is not None and (before is None or before.repairs != report.repairs):
            _log.warning("the keeper has repaired the rules (changed by %s)", last.by or "somebody")

    def _families(self) -> Iterator[Family]:
        reported = self._keeper.proofs if self._keeper is not None else ()
        inbound = (*self._visits.proofs(), *(each for each in reported if each.direction == "inbound"))
        places = {
            (proof.direction, proof.family): float(proof.result == "captured")
            for proof in (*self._proofs.values(), *inbound)
            if proof.result in _DEFINITE
        }
        told = [({"direction": direction, "family": family}, place) for (direction, family), place in places.items()]
        yield _family("meshnet_rules_in_place", "gauge", "1: a canary was captured; 0: it was not.", told)
        visits = [({"family": family}, at) for family, at in self._visits.times()]
        text = "When readiness was last asked for through the rules, which proves that what comes in is captured."
        yield _family("meshnet_inbound_proved_timestamp_seconds", "gauge", text, visits)
        counts = [({"family": family, "result": result}, float(n)) for (family, result), n in self._counts.items()]
        yield _family("meshnet_capture_proofs", "counter", "Canaries of the sidecar's own.", counts)
        status = self.status()
        uncaptured = [({"direction": name}, float(n)) for name, n in status.uncaptured.items()] if status else []
        text = "Open connections that should have come through the sidecar."
        yield _family("meshnet_uncaptured_connections", "gauge", text, uncaptured)
        keeper = self._keeper
        text = "1 while a keeper looks after the rules."
        yield _family("meshnet_rules_keeper", "gauge", text, [({}, keeper is not None)])
        if keeper is not None:
            text = "Repairs by the keeper since it began."
            yield _family("meshnet_rules_repairs", "counter", text, [({}, keeper.repairs)])


def _problems_of(keeper: KeeperReport) -> Iterator[str]:
    """What only the keeper can see."""
    if keeper.state == "failing":
        yield f"the rules cannot be kept: {keeper.problem}"
    for proof in keeper.proofs:
        if proof.direction == "inbound" and proof.result == "not captured":
            yield f"inbound {_NAMES[proof.family]} is not captured: {proof.detail} (sudo meshnet rules verify)"


def _family(name: str, kind: str, text: str, values: Iterable[tuple[Mapping[str, str], float]]) -> Family:
    sample = f"{name}_total" if kind == "counter" else name
    samples = tuple(Sample(name=sample, labels=dict(labels), value=float(value)) for labels, value in values)
    return Family(name=name, type=kind, help=text, samples=samples)


def _tell(proof: Proof, *, was_proved: bool) -> None:
    """Once for each change, not for each look."""
    name = f"outbound {_NAMES[proof.family]}"
    if proof.result == "captured":
        _log.info("%s is captured", name)
    elif proof.result == "not captured" and was_proved:
        _log.warning("%s is captured no longer: %s", name, proof.detail)
    else:
        _log.info("%s: %s, %s", name, proof.result, proof.detail)


def _told(past: tuple[Direction, TcpSocket]) -> str:
    direction, it = past
    ends = Address(host_of(it.local), it.local_port), Address(host_of(it.remote), it.remote_port)
    client, server = ends if direction is Direction.OUTBOUND else reversed(ends)
    return f"{client} -> {server}"
