"""What `meshnet up --trust-domain` names, and that it changes nobody's domain in silence."""

import re
from datetime import UTC, datetime

import pytest

from meshnet.control.authority import Authority, save_issued
from tests.cli.machine import Machine

pytestmark = pytest.mark.netns


def test_a_new_authority_has_it_and_a_second_up_may_name_it_again(machine: Machine) -> None:
    done = machine.meshnet("up", "--trust-domain", "prod")
    assert done.returncode == 0, done.stderr
    assert machine.status().certificate.identity.startswith("spiffe://prod/")
    assert "nothing changed" in machine.meshnet("up", "--trust-domain", "prod").stdout
    assert "nothing changed" in machine.meshnet("up").stdout


@pytest.mark.parametrize("domain", ["Bad Domain;", "", "Prod", "a/b"])
def test_what_is_no_trust_domain_is_refused_whatever_is_here(machine: Machine, domain: str) -> None:
    before = (machine.rules(), machine.files())
    for arguments in ((), ("--dry-run",)):
        done = machine.meshnet("up", "--trust-domain", domain, *arguments)
        assert done.returncode == 1
        assert f"error: {domain!r} is not a trust domain\n" in done.stderr
    assert (machine.rules(), machine.files()) == before
    now = datetime.now(UTC)
    save_issued(Authority.create("local", now=now).issue("spiffe://local/ns/default/sa/web", now=now), machine.identity)
    assert f"error: {domain!r} is not a trust domain\n" in machine.meshnet("up", "--trust-domain", domain).stderr


@pytest.mark.parametrize("runs", [True, False])
def test_another_than_that_of_the_identity_is_refused_with_what_changes_it(machine: Machine, runs: bool) -> None:
    machine.up()
    if not runs:
        assert machine.meshnet("down").returncode == 0
    before = (machine.rules(), (machine.identity / "cert.pem").read_bytes())
    done = machine.meshnet("up", "--trust-domain", "prod")
    assert done.returncode == 1
    assert "error: this host is in trust domain local, not prod\n" in done.stderr
    assert f"why: so says {machine.identity}/cert.pem; " in done.stderr
    assert (machine.rules(), (machine.identity / "cert.pem").read_bytes()) == before
    fix = re.search(r"meshnet (ca init .+) && meshnet (ca issue .+)$", done.stderr, re.MULTILINE)
    assert fix is not None
    for line in fix.groups():
        assert machine.meshnet(*line.split()).returncode == 0
    done = machine.meshnet("up", "--trust-domain", "prod")
    assert done.returncode == 0, done.stderr


def test_another_than_that_of_the_authority_is_refused(machine: Machine) -> None:
    assert machine.meshnet("ca", "init", "--trust-domain", "prod", "--dir", str(machine.home / "ca")).returncode == 0
    done = machine.meshnet("up", "--trust-domain", "local")
    assert done.returncode == 1
    assert f"why: so says {machine.home}/ca/ca.pem; " in done.stderr
    assert machine.up().certificate.identity.startswith("spiffe://prod/")


def test_where_the_authority_is_elsewhere_that_is_where_to_ask(machine: Machine) -> None:
    now = datetime.now(UTC)
    save_issued(Authority.create("local", now=now).issue("spiffe://local/ns/shop/sa/till", now=now), machine.identity)
    done = machine.meshnet("up", "--trust-domain", "prod")
    assert done.returncode == 1
    assert "fix: to stay there: sudo meshnet up; where the authority of prod is: meshnet ca issue" in done.stderr
    assert f" spiffe://prod/ns/shop/sa/till --out DIR; copy DIR/* to {machine.identity}/\n" in done.stderr
