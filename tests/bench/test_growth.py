import pytest

from tests.bench import machine
from tests.bench.growth import mesh
from tests.bench.growth.connections import Spent, growth_verdicts
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


def test_what_most_connections_cost_is_held_against_few_and_every_time_counts() -> None:
    spent = {
        1: Spent([90.0], [900.0]),
        100: Spent([9.0, 10.0, 11.0], [200.0, 200.0, 200.0]),
        20_000: Spent([11.0, 12.0, 12.5], [240.0, 260.0, 300.0]),
    }
    assert [each.strip() for each in growth_verdicts(spent)] == [
        "Target: a request at 20,000 at most 1.25 times what it costs at 100. 1.1, 1.2, 1.25: PASS.",
        "Target: a new connection at 20,000 at most 1.25 times what it costs at 100. 1.2, 1.3, 1.5: too noisy.",
    ]
    assert list(growth_verdicts({1: spent[1]})) == []
    assert list(growth_verdicts({1: spent[1], 100: spent[100]})) == []
    assert list(growth_verdicts({})) == []


def test_the_mesh_with_most_services_is_that_of_the_target() -> None:
    assert max(mesh.MESHES)[0] == 5000


def test_what_is_told_of_the_machine_names_no_peer_that_may_not_be_measured() -> None:
    about = machine.description([], "scripts/bench --growth")
    assert list(about) == ["command", "source", "when", "processors", "spinners", "kernel", "Python"]
    assert about["command"].startswith("scripts/bench --growth")
    assert about["source"].startswith(("commit ", "no checkout of git"))
