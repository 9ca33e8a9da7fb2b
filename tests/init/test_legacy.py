"""What only the legacy tables have: a library that ends its process, and a lock."""

import fcntl
from contextlib import closing
from pathlib import Path

import pytest

from meshnet.errors import CommandError
from meshnet_init import choose
from meshnet_init.apply import apply
from meshnet_init.backends import iptables_binaries, python_iptables
from meshnet_init.backends.iptables import Speaker
from meshnet_init.backends.iptables_binaries import Binaries, by_binaries
from meshnet_init.backends.python_iptables import PythonIptables
from meshnet_init.choose import every_backend
from meshnet_init.host import host_facts
from meshnet_init.plan import make_plan
from tests.init.kernel import capture, legacy_rules
from tests.init.test_missing import in_child
from tests.lesser_kernel import stopped
from tests.world import World

pytestmark = pytest.mark.netns


def test_what_libxtables_does_not_know_ends_its_process_and_not_ours(world: World) -> None:
    host = world.host("app")
    with host.entered(), closing(PythonIptables("ipv6")) as speaker, pytest.raises(CommandError) as caught:
        speaker.restore("*nat\n-A OUTPUT -m nosuchmatch --of 7 -j RETURN\nCOMMIT\n")
    assert "nosuchmatch" in caught.value.why
    assert legacy_rules(host, "ip6") == ""


def test_who_holds_the_lock_of_the_legacy_tables_is_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))
    monkeypatch.setattr(python_iptables, "_LOCK_WAIT", 0.1)
    host = world.host("app")
    with host.entered():
        with open(tmp_path / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(CommandError) as caught:
                apply(capture(backend="legacy"))
            assert (caught.value.code, legacy_rules(host, "ip")) == (6, "")
        assert apply(capture(backend="legacy")).changed


def test_who_holds_it_is_waited_for_by_its_programs_too(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))
    monkeypatch.setattr(iptables_binaries, "_LOCK_WAIT", "1")
    backend = by_binaries("legacy", "legacy")
    assert backend is not None
    with world.host("app").entered(), open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CommandError, match="has held the lock of the legacy tables") as caught:
            backend.apply(make_plan(capture(), host_facts()))
        assert caught.value.code == 6


@pytest.mark.parametrize("speaker", [PythonIptables("ipv4"), Binaries("ipv4", "iptables-legacy", wait=False)])
def test_who_gets_no_answer_from_the_kernel_does_not_wait_for_ever(
    world: World, monkeypatch: pytest.MonkeyPatch, speaker: Speaker
) -> None:
    """What is asked is stopped on its way, and nobody ever lets it go on."""
    for module in (python_iptables, iptables_binaries):
        monkeypatch.setattr(module, "_PATIENCE", 1.0)
    with world.host("app").entered():
        said = in_child(lambda: (stopped(), speaker.restore("*nat\nCOMMIT\n"))[1])
    assert "had not ended after 1 s, and was stopped" in said


def test_a_lock_that_is_held_does_not_take_the_place_of_an_error(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))
    monkeypatch.setattr(python_iptables, "_LOCK_WAIT", 0.1)
    (backend,) = (each for each in every_backend() if each.name == "legacy")
    with world.host("app").entered(), open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert choose._in_the_way(capture(strict=True), backend) == ()
