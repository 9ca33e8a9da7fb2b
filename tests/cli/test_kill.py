import json
import os
import subprocess
import sys

import msgspec
import pytest

from meshnet.model.admin import Accepted, ConnectionKey, KillConnections, ListConnections
from meshnet.model.connection import Connection, Direction
from tests.cli.conftest import Meshnet
from tests.cli.sidecar import INBOUND, OPEN, PLAIN, ROOT, Sidecar, all_four, clean_environment, listing


def key(connection: Connection) -> ConnectionKey:
    return ConnectionKey(
        id=connection.id,
        direction=connection.direction,
        opened_at=connection.opened_at,
        source=connection.source.address,
    )


def test_open_ones_that_match_are_named_whole_and_told(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.connections = all_four()
    sidecar.will_answer(Accepted(connections=1))
    result = meshnet("conns", "--to", "api", "--kill", "--yes", "--columns", "id,service")
    assert sidecar.asked() == ListConnections()
    assert sidecar.asked() == KillConnections(connections=(key(OPEN),))
    assert key(OPEN) == ConnectionKey(
        id="k7f2", direction=Direction.OUTBOUND, opened_at="2026-01-02T03:04:05Z", source="10.9.0.2:41000"
    )
    assert (result.exit_code, result.stdout) == (0, "ID    SERVICE\nk7f2  api:8080\n1 connection reset\n")


def test_what_has_ended_already_is_not_asked_for(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.connections = all_four()
    sidecar.will_answer(Accepted(connections=2))
    result = meshnet("conns", "--from", "web", "--kill", "-y", "--no-header", "--columns", "id")
    sidecar.asked()
    assert sidecar.asked() == KillConnections(connections=(key(OPEN), key(INBOUND), key(PLAIN)))
    assert result.stdout == "k7f2\nk7f9\nk801\n2 of 3 connections reset; the others had ended by then\n"


def test_sort_and_top_choose_too_and_json_says_what_was_reset(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.connections = all_four()
    sidecar.will_answer(Accepted(connections=1))
    result = meshnet("conns", "--all", "--sort", "age", "--top", "1", "--kill", "--yes", "-o", "json")
    assert json.loads(result.stdout) == {
        "reset": 1,
        "items": [json.loads(msgspec.json.encode(OPEN))],
        "apiVersion": "meshnet.dev/v1",
        "kind": "KilledConnections",
    }
    assert sidecar.asked() == ListConnections(all=False)


def test_many_are_asked_for_in_pieces_that_a_request_may_have(meshnet: Meshnet, sidecar: Sidecar) -> None:
    long = {"id": "x" * 64, "source": msgspec.structs.replace(OPEN.source, address="[" + "f" * 39 + "]:65535")}
    sidecar.connections = listing(*[msgspec.structs.replace(OPEN, **long)] * 450)
    sidecar.will_answer(Accepted(connections=150))
    assert meshnet("conns", "--to", "api", "--kill", "-y", "-o", "name").exit_code == 0
    sidecar.asked()
    pieces = [sidecar.asked() for _ in range(3)]
    assert [len(piece.connections) for piece in pieces if isinstance(piece, KillConnections)] == [200, 200, 50]
    assert max(len(msgspec.json.encode(piece)) for piece in pieces) < 65536


def test_nothing_that_matches_is_no_request(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.connections = all_four()
    result = meshnet("conns", "--failed", "--to", "pay", "--kill", "--yes")
    assert (result.exit_code, result.stdout) == (0, "no open connection matches\n")
    sidecar.asked()
    assert sidecar.requests.empty()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--kill --yes", "--kill takes a filter"),
        ("--kill --yes --open", "--kill takes a filter"),
        ("--kill --yes --open --not --failed --sort age --top 3", "--kill takes a filter"),
        ("--kill --yes --to db --by service", "--kill goes with filters"),
        ("--kill --yes --to db --exit-code", "--kill goes with filters"),
        ("--kill --to db -f", "--follow goes with filters"),
        ("--yes --to db", "--yes goes with --kill only"),
    ],
)
def test_what_would_end_too_many_or_makes_no_sense_is_a_usage_error(
    meshnet: Meshnet, sidecar: Sidecar, flags: str, words: str
) -> None:
    result = meshnet("conns", *flags.split())
    assert result.exit_code == 2
    assert words in result.stderr
    assert sidecar.requests.empty()


def test_without_a_terminal_nobody_is_asked_and_nothing_is_done(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.connections = all_four()
    result = meshnet("conns", "--to", "db", "--kill")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "error: nobody is there to be asked\n"
        "why: without a terminal, and with -o json, jsonl or name, --kill does not ask\n"
        "fix: look first without --kill; then add --yes\n"
    )


@pytest.mark.parametrize(("typed", "reset", "code"), [("y\n", 1, 0), ("n\n", 0, 1), ("\n", 0, 1)])
def test_on_a_terminal_it_asks_first(sidecar: Sidecar, typed: str, reset: int, code: int) -> None:
    sidecar.connections = all_four()
    sidecar.will_answer(Accepted(connections=1))
    ours, theirs = os.openpty()
    with open(ours, "w") as keyboard, open(theirs) as terminal:
        keyboard.write(typed)
        keyboard.flush()
        words = ("conns", "--to", "db", "--kill", "--socket", str(sidecar.path))
        done = subprocess.run(
            [sys.executable, "-m", "meshnet_cli.main", *words],
            cwd=ROOT,
            env={**clean_environment(), "PYTHONPATH": "cli:init:."},
            stdin=terminal,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    assert done.returncode == code
    assert "k801" in done.stdout
    assert done.stderr.startswith("Reset 1 connection, at both ends? [y/N]: ")
    assert ("error: nothing was reset" in done.stderr) == (not reset)
    assert ("1 connection reset" in done.stdout) == bool(reset)
    sidecar.asked()
    assert sidecar.requests.qsize() == reset
