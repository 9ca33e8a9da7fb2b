"""Where a backend is tried: in a namespace of its own, as far as the rights go, and else without harm, and said so."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from meshnet.errors import CommandError
from meshnet_init.backends import Lack, iptables, not_permitted
from meshnet_init.backends.scratch import tried_in_scratch
from meshnet_init.choose import choose
from meshnet_init.host import host_facts
from meshnet_init.plan import make_plan
from meshnet_init.remove import remove
from tests.init.kernel import Lab, capture, listening
from tests.init.test_missing import in_child
from tests.lesser_kernel import lacking
from tests.seccomp import Refusal, refuse
from tests.world import World

pytestmark = pytest.mark.netns

# An init container's, by the manifests of `meshnet inject`: tests/pod runs those themselves.
INIT_CONTAINER = ("setpriv", "--bounding-set=-all,+net_admin", "--inh-caps=-all", "--no-new-privs", "--")
WITH_LEGACY = ("setpriv", "--bounding-set=-all,+net_admin,+net_raw", "--inh-caps=-all", "--no-new-privs", "--")
# The keeper's unit: units.py.
_CAPABILITIES = ("--inh-caps", "--ambient-caps", "--bounding-set")
KEEPER = (
    *("setpriv", "--reuid=65534", "--regid=0", "--clear-groups", "--no-new-privs"),
    *(f"{kind}=-all,+net_admin,+net_raw" for kind in _CAPABILITIES),
    "--",
)
EVERYTHING = {"strict": True, "inbound_mode": "tproxy", "udp": "reject", "drop_invalid": True, "exclude_uids": ["7"]}

CHOOSE = """
import json, os, sys
from meshnet_init.choose import choose_for
from meshnet_init.host import host_facts
from meshnet_init.plan import make_plan
from tests.init.kernel import capture
from tests.seccomp import Refusal, refuse
refuse(*(Refusal(call, {}, 1) for call in sys.argv[2:]))  # EPERM
if os.getuid():  # who may perhaps not run this Python, as python-iptables has to
    sys.modules["iptc"] = None
settings = capture(**json.loads(sys.argv[1]))
choice = choose_for(settings, make_plan(settings, host_facts()))
print(json.dumps([choice.backend.name, *choice.notes]))
"""


def no_namespaces() -> None:
    """A container's runtime forbids them, by CAP_SYS_ADMIN and by seccomp."""
    refuse(*(Refusal("unshare", {0: flags}, errno.EPERM) for flags in (0x40000000, 0x50000000)))  # CLONE_NEW*


def chosen_as(
    lab: Lab, rights: tuple[str, ...], *refused: str, environment: dict[str, str] | None = None, **values: object
) -> list[str]:
    """Which backend a process with these rights, and without these system calls, chooses, and what it says of it."""
    line = (*rights, sys.executable, "-c", CHOOSE, json.dumps({"backend": lab.backend.name, **values}), *refused)
    done = lab.app.run(*line, PYTHONPATH=":".join(sys.path), **(environment or {}))
    return [str(word) for word in json.loads(done.stdout)]


def test_an_init_container_tries_every_kind_in_a_namespace_of_its_own(lab: Lab) -> None:
    rights = WITH_LEGACY if lab.backend.name == "legacy" else INIT_CONTAINER
    before = lab.rules_text()
    assert chosen_as(lab, rights, **EVERYTHING) == [lab.backend.name]
    assert lab.rules_text() == before
    assert "nat" not in lab.app.run("cat", "/proc/net/ip_tables_names", check=False).stdout.split()


def test_the_keeper_tries_every_kind_in_a_namespace_of_its_own(lab: Lab, real_root: bool) -> None:
    """It is a user of its own, and its unit has no capset, by which rights are handed down."""
    if not real_root:
        pytest.skip("there is no other user here: run it as root")
    with tempfile.NamedTemporaryFile(prefix="meshnet-lock-") as lock:
        Path(lock.name).chmod(0o644)
        chosen = chosen_as(lab, KEEPER, "capset", environment={"XTABLES_LOCKFILE": lock.name}, **EVERYTHING)
    assert chosen == [lab.backend.name]


def test_an_init_container_is_told_which_kind_its_kernel_lacks(world: World) -> None:
    host = world.host("app")

    def put_in() -> str:
        return host.run(*INIT_CONTAINER, "meshnet", "init", "--strict", "true", check=False).stderr

    found = lacking(["reject"], put_in)
    assert "nft was passed over: the kernel's nftables has no reject: No such file or directory" in found
    assert "in this network namespace" not in found


def test_where_no_namespace_may_be_made_it_is_said_and_nothing_is_captured_by_the_trial(lab: Lab) -> None:
    plan = make_plan(capture(**EVERYTHING), host_facts())
    before = lab.rules_text()

    def tried() -> str:
        no_namespaces()
        arrived = 0
        for _ in range(5):
            notes = choose(lab.backend.name, plan).notes
            with lab.app.connect(lab.peer.address, 80):
                arrived += 1
        return f"{arrived} arrived. {notes}"

    with listening(lab.peer, "ipv4", 80), lab.app.entered():
        said = in_child(tried)
    assert said.startswith("5 arrived"), said
    assert f"{lab.backend.name} was tried in this network namespace" in said
    assert "Operation not permitted" in said
    assert lab.rules_text() == before


def test_where_programs_would_have_no_rights_in_it_they_are_tried_here_and_it_is_said(lab: Lab) -> None:
    """Root that may make a user namespace, and not hand rights down in it (capset)."""
    plan = make_plan(capture(**EVERYTHING), host_facts())

    def tried() -> str:
        refuse(
            Refusal("unshare", {0: 0x40000000}, errno.EPERM), Refusal("capset", {}, errno.EPERM)
        )  # CLONE_NEWNET alone
        return str(choose(lab.backend.name, plan).notes)

    before = lab.rules_text()
    with lab.app.entered():
        said = in_child(tried)
    if lab.backend.name == "nft":  # which is no program
        assert said == "()"
    else:
        assert f"{lab.backend.name} was tried in this network namespace" in said
        assert "in a user namespace: not allowed to change the kernel's rules" in said
    assert lab.rules_text() == before


def test_what_a_probe_finds_or_raises_is_the_callers(world: World) -> None:
    def fails() -> Lack:
        raise CommandError("what", why="why", fix="fix", code=6)

    with world.host("app").entered():
        assert tried_in_scratch(lambda: Lack("so", "do"), Lack) == (Lack("so", "do"), "")
        assert tried_in_scratch(lambda: os.readlink("/proc/self/ns/net"), str).found != os.readlink("/proc/self/ns/net")
        with pytest.raises(CommandError) as raised:
            tried_in_scratch(fails, Lack)
    error = raised.value
    assert (error.what, error.why, error.fix, error.code) == ("what", "why", "fix", 6)


def test_a_user_namespace_without_rights_in_it_is_none(world: World) -> None:
    """AppArmor lets anybody make one on Ubuntu, and do nothing there."""
    home = os.readlink("/proc/self/ns/user")

    def probe() -> str:
        if os.readlink("/proc/self/ns/user") != home:
            raise not_permitted("change")
        return "here"

    with world.host("app").entered():
        said = in_child(as_without_sys_admin(lambda: str(tuple(tried_in_scratch(probe, str)))))
    assert said == "('here', \"in a user namespace: not allowed to change the kernel's rules\")"


@pytest.mark.parametrize(
    ("end", "why"),
    [
        (lambda: os._exit(3), "with code 3, and without a word"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "by SIGKILL"),
        (lambda: {}["rule"], "KeyError: 'rule'"),
    ],
    ids=["ended", "killed", "raised"],
)
def test_a_trial_that_fails_is_told_and_not_made_again_here(world: World, end: Callable[[], Lack], why: str) -> None:
    host = world.host("app")
    with host.entered():
        home = os.readlink("/proc/thread-self/ns/net")

    def probe() -> Lack:
        assert os.readlink("/proc/thread-self/ns/net") != home, "it was made again here"
        return end()

    with host.entered(), pytest.raises(CommandError, match="the trial of the rules has") as raised:
        tried_in_scratch(probe, Lack)
    assert (raised.value.why, raised.value.code) == (why, 1)
    assert raised.value.fix


def test_a_trial_that_hangs_is_ended_with_what_it_has_started(world: World) -> None:
    reading, writing = os.pipe()

    def probe() -> Lack:
        subprocess.run(["sleep", "infinity"], pass_fds=[writing], check=True)
        return Lack()

    with world.host("app").entered(), pytest.raises(CommandError, match="had not ended after 1 s") as raised:
        tried_in_scratch(probe, Lack, patience=1.0)
    assert raised.value.code == 6
    os.close(writing)
    assert os.read(reading, 1) == b""  # nobody has it open any more
    os.close(reading)


def test_what_a_trial_has_left_that_was_killed_goes_with_the_rules(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two commits: the chain is there, and nothing leads to it."""
    plan = make_plan(capture(**EVERYTHING), host_facts())

    def killed() -> str:
        no_namespaces()
        monkeypatch.setattr(iptables._Table, "drop_probe", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        return choose(lab.backend.name, plan).backend.name

    before = lab.rules_text()
    with lab.app.entered():
        assert in_child(killed).startswith(
            "nft" if lab.backend.name == "nft" else "the trial of the rules has died; by SIG"
        )
        assert ("MESHNET_PROBE" in lab.rules_text()) == (lab.backend.name != "nft")
        assert remove(0.0).backends == ()
    assert "MESHNET_PROBE" not in lab.rules_text()
    if lab.backend.name != "legacy":  # whose tables stay, empty
        assert lab.rules_text() == before


def as_without_sys_admin(work: Callable[[], str]) -> Callable[[], str]:
    def limited() -> str:
        refuse(Refusal("unshare", {0: 0x40000000}, errno.EPERM))  # CLONE_NEWNET alone
        return work()

    return limited
