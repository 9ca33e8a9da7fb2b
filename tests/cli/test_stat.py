import json
import os
import re
import signal
import subprocess
import sys

import pytest

from meshnet.model.admin import Family, FamilyList, GetMetrics, Sample
from tests.cli.conftest import Meshnet
from tests.cli.sidecar import ROOT, Sidecar, clean_environment, run_meshnet


def counted(name: str, value: float, service: str, **labels: str) -> Family:
    every = {"reporter": "source", "destination_service": service, **labels}
    return Family(name=name, type="counter", help="", samples=(Sample(name=name, labels=every, value=value),))


# The same at both looks, so nothing happened between.
METRICS = FamilyList(
    items=(
        counted("meshnet_tcp_connections_opened_total", 40, "api:8080"),
        counted("meshnet_tcp_connections_opened_total", 7, "db:5432"),
        counted("meshnet_tcp_connections_open", 2, "db:5432"),
        counted("meshnet_tcp_connections_failed_total", 3, "db:5432", response_flags="connect.refused"),
        counted("meshnet_tcp_sent_bytes_total", 1_200_000, "api:8080"),
        counted("meshnet_retries_total", 12, "api:8080", result="made"),
        counted("meshnet_retries_total", 3, "api:8080", result="denied"),
        Family(
            name="meshnet_tcp_connect_seconds",
            type="histogram",
            help="",
            samples=tuple(
                Sample(
                    name="meshnet_tcp_connect_seconds_bucket",
                    labels={"reporter": "source", "destination_service": "api:8080", "le": bound},
                    value=count,
                )
                for bound, count in (("0.001", 50.0), ("0.0025", 100.0), ("+Inf", 100.0))
            ),
        ),
    )
)


@pytest.fixture(autouse=True)
def metrics(sidecar: Sidecar) -> None:
    sidecar.will_answer(METRICS)


def test_the_table_has_a_row_for_each_service_and_the_totals(meshnet: Meshnet, sidecar: Sidecar) -> None:
    result = meshnet("stat", "--interval", "20ms")
    assert [sidecar.asked(), sidecar.asked()] == [GetMetrics(), GetMetrics()]
    assert result.output == (
        "SERVICE   DIR  OPEN  OPENED/S  FAILED/S  TX/S  RX/S  P50    P99    FAILED\n"
        "api:8080  out  0     0         0         0     0     1.0ms  2.5ms  0\n"
        "db:5432   out  2     0         0         0     0     -      -      3\n"
        "2 open, 0 opened/s, 0 failed/s, connect p50 1.0ms p99 2.5ms since it started.\n"
    )


def test_the_totals_of_one_service_are_its_own(meshnet: Meshnet) -> None:
    assert meshnet("stat", "db", "--interval", "20ms").output.endswith("\n2 open, 0 opened/s, 0 failed/s.\n")
    assert "connect p50 1.0ms p99 2.5ms" in meshnet("stat", "api:8080", "--interval", "20ms").output.splitlines()[-1]


def test_wide_adds_totals_and_one_service_is_found_without_its_port(meshnet: Meshnet) -> None:
    result = meshnet("stat", "api", "--interval", "20ms", "-o", "wide", "--no-header")
    assert result.output == ("api:8080  out  0  0  0  0  0  1.0ms  2.5ms  0  40  1.2M  0  -  -  -  12  3\n")


def test_json_and_name_have_the_same(meshnet: Meshnet) -> None:
    told = json.loads(meshnet("stat", "--interval", "20ms", "-o", "json", "--sort", "open").output)
    assert (told["kind"], told["connect"]["connections"]) == ("Stat", 100)
    assert [(it["service"], it["failedByReason"]) for it in told["items"]] == [
        ("db:5432", {"connect.refused": 3}),
        ("api:8080", {}),
    ]
    assert told["intervalSeconds"] >= 0.02
    assert meshnet("stat", "--interval", "20ms", "-o", "name").output == "api:8080\ndb:5432\n"


def test_top_prints_one_below_the_other_off_a_terminal(meshnet: Meshnet) -> None:
    result = meshnet("top", "--interval", "20ms", "--count", "2", "--columns", "service,open")
    one = "SERVICE   OPEN\napi:8080  0\ndb:5432   2\n"
    totals = "2 open, 0 opened/s, 0 failed/s, connect p50 1.0ms p99 2.5ms since it started.\n"
    assert result.output == f"{one}{totals}\n{one}{totals}"
    lines = meshnet("top", "--interval", "20ms", "--count", "3", "-o", "jsonl", "--sort", "open").output.splitlines()
    assert [json.loads(line)["items"][0]["service"] for line in lines] == ["db:5432"] * 3
    assert meshnet("top", "-o", "json").exit_code == 2


def test_ctrl_c_is_the_ordinary_end_of_top(sidecar: Sidecar) -> None:
    words = ("top", "--interval", "50ms", "--no-header", "--columns", "service", "--socket", str(sidecar.path))
    with run_meshnet(*words) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "api:8080\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=10)
        assert (process.returncode, said) == (0, "")


def test_on_a_terminal_top_draws_over_what_it_drew_and_cleans_up(sidecar: Sidecar) -> None:
    ours, theirs = os.openpty()
    words = ("top", "--interval", "20ms", "--count", "2", "--socket", str(sidecar.path))
    with open(ours, "rb", buffering=0) as screen, open(theirs, "wb", buffering=0) as terminal:
        process = subprocess.Popen(
            [sys.executable, "-m", "meshnet_cli.main", *words],
            cwd=ROOT,
            env={**clean_environment(), "PYTHONPATH": "cli:init:.", "COLUMNS": "40", "LINES": "4"},
            stdout=terminal,
        )
        terminal.close()
        shown = b""
        try:
            while piece := screen.read(65536):
                shown += piece
        except OSError:  # EIO: nobody has the terminal any more
            pass
        assert process.wait(timeout=10) == 0
    text = shown.decode().replace("\r\n", "\n")
    assert text.startswith("\x1b[?1049h\x1b[?25l\x1b[H")
    assert text.endswith("\x1b[J\x1b[?25h\x1b[?1049l")
    assert text.count("\x1b[H") == 2
    lines = [re.sub("\x1b\\[[0-9?]*[A-Za-z]", "", line) for line in text.split("\n")]
    assert max(map(len, lines)) <= 40  # cut to the screen's width
    assert len(lines) == 1 + 2 * 3  # and to its height: title, header and a row, twice
    assert lines[1].startswith("SERVICE   DIR  OPEN  OPENED/S")


def test_a_sidecar_that_goes_away_is_told(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.answers = []
    result = meshnet("stat", "--interval", "20ms")
    assert result.exit_code == 4
    assert "closed the connection" in result.stderr
