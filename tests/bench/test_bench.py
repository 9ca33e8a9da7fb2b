from datetime import UTC, datetime
from pathlib import Path

import pytest

from meshnet.control.authority import Authority
from tests.bench import load, machine
from tests.bench.growth.connections import connections
from tests.bench.growth.room import Room
from tests.bench.growth.storm import storm
from tests.bench.load import Result, tail
from tests.bench.report import Run, markdown
from tests.bench.rounds import Plan, measure
from tests.bench.subjects import absent, subject
from tests.bench.subjects import meshnet as meshnet_subject
from tests.bench.subjects.check import CheckFailed, Probe, check_refusals
from tests.bench.subjects.hops import DOMAIN, issue
from tests.bench.table import DIRECT, MESHNET
from tests.bench.tests import CPU, MODES, MTLS, P99, P999, PLAIN, SINGLE, TESTS, WORKERS, in_quick
from tests.world import World, wait_for


def test_quick_measures_every_mode_and_two_workers_and_every_test_but_rr32() -> None:
    cells = [(test, mode, workers) for test in TESTS if test != "rr32" for mode in MODES for workers in WORKERS]
    quick = [cell for cell in cells if in_quick(TESTS[cell[0]], *cell[1:])]
    assert all({cell[part] for cell in quick} == {cell[part] for cell in cells} for part in range(3))
    assert len(quick) < len(cells)


# The real thing, briefly. Whatever the machine does meanwhile, figures are figures: none of it is about how fast.


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return load.build(tmp_path_factory.mktemp("generator"))


@pytest.mark.usefixtures("world")
def test_a_short_run_has_figures_for_meshnet_and_a_peer(program: Path) -> None:
    plan = Plan(
        tests=["rr64", "stream8", "bidi", "crr"],
        modes=[MTLS],
        workers=[1],
        peers=[DIRECT, "nginx", MESHNET],
        rounds=1,
        seconds=0.5,
        patience=0,
        quick=False,
    )
    machine.allow_many_files()
    with machine.spinners(program, on=True) as spinning:
        assert spinning
        measured = measure(program, plan, spinning)
    assert [(sample.peer, sample.failure) for sample in measured.samples if sample.failure or sample.absent] == []
    assert {sample.peer for sample in measured.samples} == {DIRECT, "nginx", MESHNET}
    for one in measured.samples:
        wanted = {figure.key for figure in TESTS[one.cell.test].figures}
        missing = wanted - one.values.keys() - {P99, P999}  # it depends on how many there were
        assert missing == ({CPU} if one.peer == DIRECT else set())
        assert all(one.values[figure] > 0 for figure in wanted & one.values.keys())
    assert "| **crr**" in markdown([[Run("Briefly", 1, machine.description(spinning), measured.samples)]])
    assert measured.looks


@pytest.mark.parametrize(("units", "told"), [(999, set()), (1_000, {P99}), (9_999, {P99}), (10_000, {P99, P999})])
def test_a_tail_is_told_of_enough(units: int, told: set[str]) -> None:
    seen = Result(
        units=units,
        opened=1,
        bytes=0,
        seconds=1.0,
        cpu_seconds=1.0,
        others=0.0,
        stolen=0.0,
        p50_us=1.0,
        p90_us=2.0,
        p99_us=3.0,
        p999_us=4.0,
        errors=0,
        first_error="",
    )
    assert tail(seen).keys() == told


@pytest.mark.usefixtures("world")
def test_the_workers_of_a_sidecar_are_measured_with_it(program: Path) -> None:
    with subject(MESHNET, SINGLE, 2, program) as one:
        (sidecar,) = one.sidecars
        assert len(one.pids()) == 3
        assert sidecar.pid in one.pids()


def test_what_cannot_be_measured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meshnet_subject, "SETTINGS", {1: {}})
    assert absent(MESHNET, 1) == ""
    assert absent(MESHNET, 2) == "not yet"
    assert absent(DIRECT, 1) == ""


def test_who_serves_everybody_does_not_pass_the_check(world: World, program: Path, tmp_path: Path) -> None:
    web, api = world.host("web"), world.host("api")
    api.spawn(program, "serve", "8080")
    wait_for(lambda: api.listens(8080))
    issue(Authority.create(DOMAIN, now=datetime.now(UTC)), "web", tmp_path)
    with pytest.raises(CheckFailed, match="plain text was served"):
        check_refusals(web, (api.address, 8080), tmp_path, Probe(b"Eecho", b"Eecho"))


@pytest.mark.usefixtures("world")
def test_every_connection_of_a_storm_has_one_record_on_both_sides(program: Path) -> None:
    table, wrong = storm(program, [MTLS], warm=0.1, seconds=0.5)
    assert not wrong
    assert f"| {MTLS} |" in table


@pytest.mark.usefixtures("world")
def test_levels_of_open_connections_are_measured_and_one_beyond_the_descriptors_is_named(program: Path) -> None:
    text = connections(program, PLAIN, [1, 50, 5000], Room(files=500, memory=1 << 20), 60.0)
    _, _, *rows, missed = text.splitlines()
    assert [row.split()[1] for row in rows] == ["1", "50", "86"]
    assert missed.startswith("Not reached: 5,000, for a process may have 500 descriptors here")


@pytest.mark.usefixtures("world")
def test_open_connections_are_spread_among_workers_holders_and_servers(program: Path) -> None:
    text = connections(program, MTLS, [300], Room(files=400, memory=1 << 20, workers=4), 60.0)
    _, _, row, missed = text.splitlines()
    assert row.split()[1] == "256"
    assert "of 4 workers" in missed


@pytest.mark.usefixtures("world")
def test_levels_for_which_there_is_no_time_are_named(program: Path) -> None:
    text = connections(program, PLAIN, [1, 2], Room(files=1000, memory=1 << 20), 0.0)
    assert text.splitlines()[2:] == ["Not reached: 1, 2, for the 0 s that this table may take were over."]
