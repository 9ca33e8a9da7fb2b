import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.codec.mesh import read_mesh
from meshnet.codec.snapshot import decode_snapshot, encode_snapshot
from meshnet.decide.names import KnownName, Lookup, NamedMesh, addresses_in, nameless, usable
from meshnet.model.address import Address
from meshnet.model.service import TunnelKind
from meshnet.model.snapshot import Snapshot

MESH = """\
apiVersion: meshnet.dev/v1
kind: Service
metadata: {name: db}
spec:
  addresses: [10.96.0.1]
  ports: [{port: 5432}, {port: 80, targetPort: 8080}]
  endpoints:
    - address: 10.1.0.1
    - {address: DB.example.com, weight: 3}
    - {address: spare, tunnel: meshnet, identity: "spiffe://prod/sa/db"}
---
apiVersion: meshnet.dev/v1
kind: Service
metadata: {name: other}
spec: {addresses: [10.96.0.2], ports: [{port: 5432}], endpoints: [{address: 10.1.0.9}]}
"""
DB, SPARE = "db.example.com", "spare"


class Fixed:
    def __init__(self, shown: float) -> None:
        self.shown = shown

    def random(self) -> float:
        return self.shown


LOW = Fixed(0.0)


def written(text: str = MESH) -> Snapshot:
    return read_mesh([("mesh.yaml", text)], 1)


def hosts(snapshot: Snapshot, place: int = 0) -> list[str]:
    return [endpoint.name for endpoint in snapshot.services[place].endpoints]


def test_a_name_is_as_many_endpoints_as_it_has_addresses_with_what_was_written_of_it() -> None:
    mesh = NamedMesh(written())
    assert mesh.names == {DB, SPARE}
    snapshot = mesh.with_addresses({DB: ("10.2.0.1", "fd00::1"), SPARE: ("10.3.0.1",)})
    assert hosts(snapshot, 0) == ["10.1.0.1:8080", "10.2.0.1:8080", "[fd00::1]:8080", "10.3.0.1:8080"]
    assert hosts(snapshot, 1) == ["10.1.0.1:5432", "10.2.0.1:5432", "[fd00::1]:5432", "10.3.0.1:5432"]
    static, first, _, spare = snapshot.services[0].endpoints
    assert (static.dns_name, first.dns_name, first.weight, first.tunnel) == ("", DB, 3, TunnelKind.NONE)
    assert (spare.dns_name, spare.tunnel, spare.identity) == (SPARE, TunnelKind.MESHNET, "spiffe://prod/sa/db")


def test_a_snapshot_has_the_same_service_wherever_it_names_it() -> None:
    snapshot = NamedMesh(written()).with_addresses({DB: ("10.2.0.1",)})
    assert set(snapshot.by_endpoint) == {each.address for port in snapshot.services for each in port.endpoints}
    for port, endpoint in snapshot.by_endpoint.values():
        assert any(port is each for each in snapshot.services)
        assert any(endpoint is each for each in port.endpoints)
    assert all(any(port is each for each in snapshot.services) for port in snapshot.by_address.values())
    assert snapshot.by_address[Address("10.96.0.1", 80)].endpoints[1].address == Address("10.2.0.1", 8080)


def test_what_stays_the_same_stays_the_same_object() -> None:
    mesh = NamedMesh(written())
    before = mesh.with_addresses({DB: ("10.2.0.1",)})
    after = mesh.with_addresses({DB: ("10.2.0.1",), SPARE: ()})
    assert [a is b for a, b in zip(before.services, after.services, strict=True)] == [True, True, True]
    changed = mesh.with_addresses({DB: ("10.2.0.2",)})
    assert [a is b for a, b in zip(before.services, changed.services, strict=True)] == [False, False, True]


def test_a_mesh_without_names_is_left_as_it_is() -> None:
    snapshot = written(MESH.partition("---\n")[2])
    assert NamedMesh(snapshot).with_addresses({}) is snapshot


def test_what_was_written_wins_over_what_a_name_server_says_of_another_service() -> None:
    snapshot = NamedMesh(written()).with_addresses({DB: ("10.1.0.9",)})
    port, endpoint = snapshot.by_endpoint[Address("10.1.0.9", 5432)]
    assert (port.service, endpoint.dns_name) == ("other", "")


def test_of_two_endpoints_at_one_address_the_one_that_is_in_the_mesh_stays() -> None:
    snapshot = NamedMesh(written()).with_addresses({DB: ("10.1.0.1", "10.3.0.1"), SPARE: ("10.3.0.1", "10.1.0.1")})
    kinds = {each.name: each.tunnel for each in snapshot.services[1].endpoints}
    assert kinds == {"10.1.0.1:5432": TunnelKind.MESHNET, "10.3.0.1:5432": TunnelKind.MESHNET}


def test_names_without_an_address_are_told() -> None:
    snapshot = NamedMesh(written()).with_addresses({SPARE: ("10.3.0.1",)})
    assert [nameless(port) for port in snapshot.services] == [(DB,), (DB,), ()]


def test_a_mesh_that_was_kept_gives_its_addresses_and_what_was_written() -> None:
    known = {DB: ("10.2.0.1", "10.2.0.2"), SPARE: ("10.1.0.9",)}
    made = NamedMesh(written()).with_addresses(known)
    kept = decode_snapshot(encode_snapshot(made), 1)
    assert kept.services == made.services
    assert addresses_in(kept) == known
    assert NamedMesh(kept).with_addresses(known) == made
    assert NamedMesh(kept).with_addresses({}) == NamedMesh(written()).with_addresses({})


@pytest.mark.parametrize(
    ("found", "hosts"),
    [
        (["10.0.0.2", "10.0.0.1", "10.0.0.2"], ("10.0.0.1", "10.0.0.2")),
        (["::ffff:10.0.0.1", "FD00::0001"], ("10.0.0.1", "fd00::1")),
        (["0.0.0.0", "::", "224.0.0.1", "ff02::1", "fe80::1%eth0"], ()),
        (["127.0.1.1"], ("127.0.1.1",)),
    ],
)
def test_only_addresses_that_a_connection_can_go_to_are_taken(found: list[str], hosts: tuple[str, ...]) -> None:
    assert usable(found) == hosts


@pytest.mark.parametrize(("ttl", "seconds"), [(0, 2), (1.5, 2), (60, 60), (86400, 300)])
def test_a_name_is_asked_for_as_its_ttl_says_within_bounds(ttl: float, seconds: float) -> None:
    assert KnownName().learned(Lookup(("10.0.0.1",), ttl), LOW) == seconds
    assert KnownName().learned(Lookup(("10.0.0.1",), ttl), Fixed(0.5)) == pytest.approx(seconds * 1.05)


def test_after_a_failure_it_is_asked_for_soon_then_less_and_less_and_the_addresses_stay() -> None:
    name = KnownName()
    name.learned(Lookup(("10.0.0.1",), 60.0), LOW)
    pauses = [name.learned(Lookup(problem="SERVFAIL"), LOW) for _ in range(8)]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert (name.hosts, name.problem) == (("10.0.0.1",), "SERVFAIL")
    assert name.learned(Lookup(("10.0.0.2",), 60.0), LOW) == 60
    assert (name.hosts, name.problem) == (("10.0.0.2",), "")
    assert name.learned(Lookup(problem="SERVFAIL"), LOW) == 1


def test_a_part_of_an_answer_is_taken_only_where_nothing_is_known() -> None:
    part = Lookup(("10.0.0.1",), 60.0, "no answer for AAAA")
    name = KnownName()
    name.learned(part, LOW)
    assert name.hosts == ("10.0.0.1",)
    name = KnownName(("10.0.0.1", "fd00::1"))
    name.learned(part, LOW)
    assert name.hosts == ("10.0.0.1", "fd00::1")


LOOKUPS = st.builds(
    Lookup,
    st.lists(st.sampled_from(["10.0.0.1", "10.0.0.2", "fd00::1"]), unique=True).map(lambda each: tuple(sorted(each))),
    st.floats(0, 2**31),
    st.sampled_from(["", "", "SERVFAIL"]),
)


@given(st.lists(LOOKUPS), st.integers())
def test_addresses_are_never_lost_and_a_question_is_neither_too_soon_nor_too_late(
    lookups: list[Lookup], seed: int
) -> None:
    name, dice = KnownName(), random.Random(seed)
    for lookup in lookups:
        before = name.hosts
        pause = name.learned(lookup, dice)
        assert name.hosts in (before, lookup.hosts)
        assert name.hosts or not before
        assert name.problem == lookup.problem
        least, most = (1.0, 60.0) if lookup.problem else (2.0, 300.0)
        assert least <= pause <= most * 1.1
