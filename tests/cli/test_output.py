import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.model.connection import Connection, Peer
from meshnet_cli.output import age, harmless_json, milliseconds, parse_size, printable, size
from meshnet_cli.table import cell_width, table_lines
from tests.cli.conftest import Meshnet
from tests.cli.sidecar import OPEN, REFUSED, Sidecar, listing

HOSTILE = "web\x1b]0;owned\x07\x1b[2J\u202egnp.exe\u200b\r\n\x9b31mroot"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1K"),
        (4_100, "4.1K"),
        (9_949, "9.9K"),
        (9_951, "10K"),
        (88_000, "88K"),
        (999_499, "999K"),
        (999_500, "1M"),
        (1_200_000, "1.2M"),
        (9_000_000_000, "9G"),
        (3 * 10**18, "3000P"),
    ],
)
def test_sizes_are_short(count: int, text: str) -> None:
    assert size(count) == text


@given(st.integers(0, 10**17))
def test_a_size_reads_back_within_five_in_a_hundred(count: int) -> None:
    assert parse_size(size(count)) == pytest.approx(count, rel=0.05)


@pytest.mark.parametrize("text", ["", "K", "-1", "1.K", "1 K", "1e3", "12B", "٣"])
def test_a_wrong_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as"):
        parse_size(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1.0, "0s"),
        (0.9, "0s"),
        (12.0, "12s"),
        (60.0, "1m"),
        (134.0, "2m14s"),
        (3 * 3600.0, "3h"),
        (3 * 3600.0 + 5, "3h"),
        (3 * 3600.0 + 300, "3h5m"),
        (4 * 86400.0 + 2 * 3600 + 59, "4d2h"),
    ],
)
def test_ages_have_two_units_at_most(seconds: float, text: str) -> None:
    assert age(seconds) == text


def test_milliseconds_are_exact_only_where_it_matters() -> None:
    assert [milliseconds(value) for value in (None, 0.04, 3.44, 9.96, 2000.0)] == [
        "-",
        "0.0ms",
        "3.4ms",
        "10ms",
        "2000ms",
    ]


@given(st.text())
def test_what_is_printed_has_no_character_a_terminal_acts_on(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert text != shown or text.isprintable()


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_harmless_json_is_the_same_json(value: object) -> None:
    try:
        text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    except UnicodeEncodeError:
        return  # a lone surrogate: not JSON at all
    shown = harmless_json(text)
    assert json.loads(shown) == value
    assert shown.replace("\n", "").isprintable()


def test_columns_line_up_by_what_a_terminal_shows() -> None:
    lines = table_lines(["NAME", "N"], [["支付", "1"], ["cafe\u0301", "22"], ["plain", "3"]])
    assert lines == ["NAME   N", "支付   1", "cafe\u0301   22", "plain  3"]
    assert {cell_width(line[: line.rindex(" ") + 1]) for line in lines} == {7}


def test_a_table_without_rows_is_its_header_and_without_both_nothing() -> None:
    assert table_lines(["A", "B"], []) == ["A  B"]
    assert table_lines(["A", "B"], [], header=False) == []


@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), max_size=5))
def test_a_table_is_one_printable_line_a_row(rows: list[tuple[str, str]]) -> None:
    lines = table_lines(["A", "B"], rows)
    assert len(lines) == len(rows) + 1
    assert all(line.isprintable() for line in lines)


def hostile_connection() -> Connection:
    return msgspec.structs.replace(
        REFUSED,
        id="$(reboot)\x1b",
        source=Peer(address=HOSTILE, identity=HOSTILE, service=HOSTILE),
        destination=Peer(address=HOSTILE, identity=HOSTILE, service=HOSTILE),
        endpoint=HOSTILE,
        policy=HOSTILE,
        trace=(HOSTILE,),
    )


@pytest.mark.parametrize(
    "command",
    [
        "conns",
        "conns -o wide",
        "conns -o json",
        "conns -o jsonl",
        "conns -o name",
        "explain x",
        "explain x -o json",
        "explain x -o name",
    ],
)
def test_names_that_peers_made_up_cannot_write_to_the_terminal(
    meshnet: Meshnet, sidecar: Sidecar, command: str
) -> None:
    sidecar.will_answer(hostile_connection())
    shadow = msgspec.structs.replace(hostile_connection(), opened_at="2026-01-02T03:04:06Z")
    sidecar.connections = listing(hostile_connection(), shadow)
    result = meshnet(*command.split())
    assert result.exit_code == 0
    assert all(line.isprintable() for line in result.output.split("\n"))
    if "json" in command:
        assert all(map(json.loads, result.output.splitlines() if "jsonl" in command else [result.output]))


def test_a_hostile_name_stays_on_its_line_and_is_spelled_out(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(listing(msgspec.structs.replace(OPEN, destination=Peer(service=HOSTILE))))
    assert meshnet("conns", "--columns", "service", "--no-header").output == (
        r"web\x1b]0;owned\x07\x1b[2J\u202egnp.exe\u200b\r\n\x9b31mroot" + "\n"
    )


def test_the_command_to_paste_is_quoted_for_a_shell(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(listing(msgspec.structs.replace(REFUSED, id="$(reboot)")))
    assert "meshnet explain '$(reboot)'\n" in meshnet("conns").output
