import pytest

from tests.bench import machine
from tests.bench.growth import mesh
from tests.bench.report import number


def test_a_mesh_that_grows_has_the_worst_of_three_changes_and_a_verdict_on_all_of_them() -> None:
    _, _, *rows, _, said = mesh.services([(1, 1), (40, 2)]).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:2] for row in cells] == [["1", "1"], ["40", "2"]]
    assert all(float(figure) >= 0 for row in cells for figure in row[2:])
    target, seen = said.split(". ", 1)
    assert target == "Target: a lag of at most 5 ms while 40 services change"
    lags = [float(lag) for lag in seen.partition(" ms: ")[0].split(", ")]
    assert len(lags) == 3
    assert cells[1][4] == number(max(lags))
    assert [row[2] for row in cells] == ["2", "41"]  # orders: one for each service, and the one that tells the revision


@pytest.mark.parametrize(
    ("lags", "said"),
    [
        ([2.9, 5.0, 4.1], "2.9, 5, 4.1 ms: PASS."),
        ([2.9, 5.1, 4.1], "2.9, 5.1, 4.1 ms: too noisy."),
        ([7.4, 5.1, 9.0], "7.4, 5.1, 9 ms: miss."),
    ],
)
def test_the_worst_change_counts_and_not_the_median(lags: list[float], said: str) -> None:
    assert mesh.lag_verdict(5000, lags) == f"Target: a lag of at most 5 ms while 5,000 services change. {said}"


def test_the_mesh_with_most_services_is_that_of_the_target() -> None:
    assert max(mesh.MESHES)[0] == 5000


def test_what_is_told_of_the_machine_names_no_peer_that_may_not_be_measured() -> None:
    about = machine.description([], "scripts/bench --growth")
    assert list(about) == ["command", "source", "when", "processors", "spinners", "kernel", "Python"]
    assert about["command"].startswith("scripts/bench --growth")
    assert about["source"].startswith(("commit ", "no checkout of git"))
