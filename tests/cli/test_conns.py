import json
import os
import signal
import socket

import msgspec
import pytest

from meshnet.errors import EndedBy, Phase, Reason
from meshnet.model.admin import ConnectionEvent, FollowConnections, ListConnections, Refused
from meshnet.model.connection import Connection, Direction, Peer, ReasonView, State
from tests.cli.conftest import Meshnet
from tests.cli.sidecar import INBOUND, OPEN, PLAIN, REFUSED, Sidecar, all_four, listing, run_meshnet

HEADER = "ID    DIR  CLIENT  SERVICE       ENDPOINT        TLS    POLICY                  AGE    TX    RX   STATE\n"


def test_the_table_shows_open_ones_and_why_the_others_failed(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(all_four())
    result = meshnet("conns")
    assert result.exit_code == 0
    assert result.output == HEADER + (
        "k7f2  out  web     api:8080      10.9.0.3:8080   mtls   -                       2m14s  1.2M  88K  open\n"
        "k7f9  in   web     metrics:9090  127.0.0.1:9090  mtls   default/web-to-metrics  12s    4.1K  999  half-in\n"
        "k801  out  web     db:5432       10.9.0.4:5432   PLAIN  -                       0s     0     90K  open\n"
        "k802  out  web     pay:9000      -               -      -                       2s     0     0    refused\n"
        "        breaker.open  both endpoints of pay:9000 are ejected; next probe in 24s  meshnet explain k802\n"
        "3 open (1 plaintext), 1 failed in the last 60s.\n"
    )


def test_that_a_worker_did_not_answer_is_told_beside_what_the_others_said(meshnet: Meshnet, sidecar: Sidecar) -> None:
    answer = listing(OPEN)
    sidecar.will_answer(
        msgspec.structs.replace(answer, metadata=msgspec.structs.replace(answer.metadata, silent_workers=1))
    )
    result = meshnet("conns", "-o", "name")
    assert result.stdout == "k7f2\n"
    assert result.stderr == (
        "warning: workers that did not answer: 1; what they have is missing here (see meshnet status)\n"
    )


def test_the_canary_of_rules_verify_is_told_from_traffic(meshnet: Meshnet, sidecar: Sidecar) -> None:
    canary = msgspec.structs.replace(
        OPEN, state=State.CLOSED, destination=Peer(), original_destination="[2001:db8::2]:15122"
    )
    # Somebody's own service may have such an address, and what comes in may claim it.
    service = msgspec.structs.replace(canary, destination=Peer(service="doc:15122"))
    inbound = msgspec.structs.replace(canary, direction=Direction.INBOUND)
    sidecar.will_answer(listing(canary, service, inbound))
    result = meshnet("conns", "--all", "--columns", "dir,service", "--no-header")
    assert result.output == "out  (rules verify)\nout  doc:15122\nin   [2001:db8::2]:15122\n"


def test_wide_adds_times_tries_and_identities(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(listing(OPEN))
    header, row, _ = meshnet("conns", "-o", "wide").output.splitlines()
    shown = dict(zip(header.split(), row.split(), strict=True))
    assert {name: shown[name] for name in list(shown)[11:]} == {
        "IDLE": "1s",
        "CONNECT": "3.4ms",
        "TLS_MS": "2.2ms",
        "TRIES": "1",
        "ORIG_DST": "10.96.0.12:8080",
        "SRC_IDENTITY": "spiffe://prod/ns/default/sa/web",
        "DST_IDENTITY": "spiffe://prod/ns/default/sa/api",
        "RELAY": "python",
        "REASON": "-",
        "PROCESS": "-",
        "LEG_PORT": "-",
        "RTT": "-",
        "RETRANS": "-",
    }


def test_wide_names_the_program_that_opened_it(meshnet: Meshnet, sidecar: Sidecar) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        ours = msgspec.structs.replace(OPEN, source=Peer(address="{}:{}".format(*client.getsockname())))
        sidecar.will_answer(listing(ours, msgspec.structs.replace(ours, direction=Direction.INBOUND)))
        result = meshnet("conns", "--columns", "dir,process", "--no-header")
    rows = [line.split() for line in result.output.splitlines()]
    assert rows[0][0] == "out"
    assert rows[0][1].endswith(f"[{os.getpid()}]")


def test_nothing_open_is_a_table_without_rows(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(listing())
    assert meshnet("conns").output == (
        "ID  DIR  CLIENT  SERVICE  ENDPOINT  TLS  POLICY  AGE  TX  RX  STATE\n0 open, 0 failed in the last 60s.\n"
    )


def test_json_is_what_the_sidecar_said_cut_down_to_what_matches(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(all_four())
    assert json.loads(meshnet("conns", "-o", "json").output) == json.loads(msgspec.json.encode(all_four()))
    assert json.loads(meshnet("conns", "-o", "json", "--to", "pay").output) == json.loads(
        msgspec.json.encode(listing(REFUSED))
    )


def test_jsonl_is_one_connection_a_line_and_name_one_id_a_line(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(all_four())
    lines = meshnet("conns", "-o", "jsonl").output.splitlines()
    assert [msgspec.json.decode(line, type=Connection) for line in lines] == [OPEN, INBOUND, PLAIN, REFUSED]
    assert meshnet("conns", "-o", "name").output == "k7f2\nk7f9\nk801\nk802\n"


def test_columns_are_chosen_by_name_and_no_header_leaves_rows_only(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(all_four())
    result = meshnet("conns", "--columns", "id,tries,reason", "--no-header")
    assert result.output == "k7f2  1  -\nk7f9  0  -\nk801  0  -\nk802  2  breaker.open\n"


def test_an_unknown_column_is_a_usage_error_with_a_suggestion(meshnet: Meshnet) -> None:
    result = meshnet("conns", "--columns", "id,stat")
    assert result.exit_code == 2
    assert "no column 'STAT'; did you mean STATE?" in result.stderr


@pytest.mark.parametrize(
    ("flags", "ids"),
    [
        ("--from web", "k7f2 k7f9 k801 k802"),
        ("--from 10.9.0.7", "k7f9"),
        ("--from 10.9.0.0/30", "k7f2 k801 k802"),
        ("--from spiffe://prod/*", "k7f2 k7f9"),
        ("--to api", "k7f2"),
        ("--to api:8080", "k7f2"),
        ("--to 10.96.0.12", "k7f2"),
        ("--to 10.9.0.3:8080", "k7f2"),
        ("--to api --to db", "k7f2 k801"),
        ("--peer 10.9.0.7", "k7f9"),
        ("--peer 10.9.0.4", "k801"),
        ("--service m*", "k7f9"),
        ("--port 9000", "k802"),
        ("--dir in", "k7f9"),
        ("--state open", "k7f2 k801"),
        ("--state open --state refused", "k7f2 k801 k802"),
        ("--open", "k7f2 k7f9 k801"),
        ("--failed", "k802"),
        ("--failed --state half-in", "k7f9 k802"),
        ("--tls none", "k802"),
        ("--plain", "k801"),
        ("--plain --tls mtls", "k7f2 k7f9 k801"),
        ("--identity */sa/api", "k7f2"),
        ("--policy default/*", "k7f9"),
        ("--reason breaker.open", "k802"),
        ("--reason limit.* --reason breaker.*", "k802"),
        ("--min-age 2s", "k7f2 k7f9 k802"),
        ("--min-bytes 90K", "k7f2 k801"),
        ("--since 50s", "k802"),
        ("--since 60s", "k801 k802"),
        ("--not --to db", "k7f2 k7f9 k802"),
        ("--not --to=db --not --plain --open", "k7f2 k7f9"),
        ("--not --failed --min-age 2s", "k7f2 k7f9"),
        ("--from web --not --dir in --not --service api", "k801 k802"),
        ("--sort age", "k7f2 k7f9 k802 k801"),
        ("--sort rx --top 2", "k801 k7f2"),
        ("--sort tx --top 1 --not --to api", "k7f9"),
        ("--top 2", "k801 k802"),
        ("--top 9 --failed", "k802"),
    ],
)
def test_filters_choose_rows(meshnet: Meshnet, sidecar: Sidecar, flags: str, ids: str) -> None:
    sidecar.will_answer(all_four())
    result = meshnet("conns", "-o", "name", *flags.split())
    assert result.output.split() == ids.split()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--dir up", "'up' is not in or out"),
        ("--state opne", "'opne' is not one of connecting, queued, open"),
        ("--tls ssl", "'ssl' is not one of mtls, plain, none"),
        ("--reason breaker", "'breaker' is not a reason; there are ok, no_endpoint"),
        ("--port 70000", "'70000' is not a port"),
        ("--from 10.9.0.1/24", "has host bits set"),
        ("--min-age 5", "'5' is not a duration such as"),
        ("--min-bytes lots", "'lots' is not a size such as"),
        ("--not", "--not stands before the filter it inverts"),
        ("--not --sort age", "--not stands before the filter it inverts"),
        ("-f --sort age", "--follow goes with filters"),
        ("-f -o json", "--follow goes with filters"),
    ],
)
def test_a_wrong_filter_is_a_usage_error_in_words(meshnet: Meshnet, flags: str, words: str) -> None:
    result = meshnet("conns", *flags.split())
    assert result.exit_code == 2
    assert words in result.stderr


def test_the_totals_count_what_matches_and_say_that_there_is_more(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(all_four())
    assert meshnet("conns", "--to", "db").output.endswith(
        "\n1 open (1 plaintext), 0 failed in the last 60s. 3 more do not match.\n"
    )
    closed = msgspec.structs.replace(OPEN, state=State.CLOSED, reason=ReasonView(code=Reason.OK))
    sidecar.will_answer(listing(closed, REFUSED))
    assert meshnet("conns", "--all").output.endswith("\n0 open, 1 closed, 1 failed.\n")
    assert meshnet("conns", "--all", "--failed").output.endswith(" 1 more does not match.\n")


def test_how_far_back_to_look_is_what_the_sidecar_is_asked(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(listing())
    meshnet("conns")
    meshnet("conns", "--recent", "5m")
    meshnet("conns", "--since", "10m")
    meshnet("conns", "--since", "10m", "--failed", "--to", "db")
    meshnet("conns", "--since", "10m", "--failed", "--state", "closed")
    meshnet("conns", "--all")
    assert [sidecar.asked() for _ in range(6)] == [
        ListConnections(recent=60.0),
        ListConnections(recent=300.0),
        ListConnections(recent=600.0, all=True),
        ListConnections(recent=600.0),
        ListConnections(recent=600.0, all=True),
        ListConnections(recent=60.0, all=True),
    ]


def closed(name: str, minute: int) -> Connection:
    moment = f"2026-01-02T03:{minute:02}:00Z"
    reason = ReasonView(code=Reason.OK)
    return msgspec.structs.replace(OPEN, id=name, state=State.CLOSED, closed_at=moment, reason=reason)


def part(*connections: Connection, before: tuple[int, ...] = (), back: str = "", failed_back: str = "") -> bytes:
    answer = listing(*connections)
    metadata = msgspec.structs.replace(answer.metadata, before=before, reaches_back=back, failed_reach_back=failed_back)
    return msgspec.json.encode(msgspec.structs.replace(answer, metadata=metadata))


def test_what_comes_in_parts_is_asked_for_to_the_end_and_shown_as_it_ended(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.parts = [
        part(closed("d", 4), OPEN, PLAIN, before=(7, 7)),
        part(closed("b", 2), before=(6, 7)),
        part(before=(6, 6)),
        part(closed("a", 1), closed("c", 3)),
    ]
    result = meshnet("conns", "--all", "-o", "name")
    assert result.stdout.split() == ["a", "b", "c", "d", OPEN.id, PLAIN.id]
    asked = [sidecar.asked() for _ in range(4)]
    assert asked == [ListConnections(all=True, before=before) for before in ((), (7, 7), (6, 7), (6, 6))]


def test_since_asks_for_no_part_that_ended_before(meshnet: Meshnet, sidecar: Sidecar) -> None:
    """The first part has those that failed of late too, and they may all be old. It is 03:06."""
    sidecar.parts = [
        part(msgspec.structs.replace(REFUSED, closed_at="2026-01-02T02:00:00Z"), before=(7, 7)),
        part(closed("a", 4), closed("b", 5), before=(6, 7)),
        part(closed("c", 2), before=(6, 6)),
    ]
    assert meshnet("conns", "--since", "3m", "-o", "name").stdout.split() == ["a", "b"]
    assert not sidecar.parts


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--all", ["ended", "failed"]),
        ("--since 1h", ["ended", "failed"]),
        ("--since 10m", ["ended"]),
        ("--since 2m", []),
        ("--since 10m --failed", []),
        ("--recent 1h", ["failed"]),
        ("", []),
    ],
)
def test_what_is_forgotten_of_what_was_asked_for_is_told(
    meshnet: Meshnet, sidecar: Sidecar, flags: str, told: list[str]
) -> None:
    back, failed_back = "2026-01-02T03:01:00.000Z", "2026-01-02T02:30:00.000Z"
    sidecar.parts = [part(OPEN, back=back, failed_back=failed_back)]
    lines = meshnet("conns", *flags.split()).stdout.splitlines()
    moments = {"ended": back, "failed": failed_back}
    assert lines[3:] == [
        f"Of what {each} before {moments[each]} not all is remembered (admin.memory_mib)." for each in told
    ]


def test_exit_code_says_whether_any_row_matches(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(all_four())
    assert meshnet("conns", "--plain", "--exit-code").exit_code == 1
    assert meshnet("conns", "--plain", "--to", "api", "--exit-code").exit_code == 0


def test_color_is_for_terminals_unless_it_is_asked_for(
    meshnet: Meshnet, sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    sidecar.will_answer(listing(PLAIN))
    assert "\x1b" not in meshnet("conns").output
    assert "\x1b[33mPLAIN\x1b[0m" in meshnet("conns", "--color", "always").output
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in meshnet("conns").output
    assert "\x1b" in meshnet("conns", "--color", "always").output


# Follow.

DENIED = msgspec.structs.replace(
    INBOUND,
    id="k900",
    state=State.DENIED,
    reason=ReasonView(
        code=Reason.AUTHZ_DENIED, message="no ALLOW policy fits", ended_by=EndedBy.POLICY, phase=Phase.AUTHZ
    ),
)
CLOSED = msgspec.structs.replace(OPEN, state=State.CLOSED, reason=ReasonView(code=Reason.OK))
EVENTS = (
    ConnectionEvent(event="open", connection=OPEN),
    ConnectionEvent(event="update", connection=OPEN),
    ConnectionEvent(event="deny", connection=DENIED),
    ConnectionEvent(event="fail", connection=REFUSED),
    ConnectionEvent(event="lost", count=12),
    ConnectionEvent(event="close", connection=CLOSED),
)


def test_follow_prints_a_line_an_event_until_the_sidecar_stops(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(*EVENTS)
    result = meshnet("conns", "-f", "--columns", "id,dir,client,service,tls,tx,state")
    assert sidecar.asked() == FollowConnections()
    assert result.stdout == (
        "EVENT    ID        DIR  CLIENT            SERVICE           TLS    TX     STATE\n"
        "+ open   k7f2      out  web               api:8080          mtls   1.2M   open\n"
        "x deny   k900      in   web               metrics:9090      mtls   4.1K   denied\n"
        "        authz.denied  no ALLOW policy fits  meshnet explain k900\n"
        "! fail   k802      out  web               pay:9000          -      0      refused\n"
        "        breaker.open  both endpoints of pay:9000 are ejected; next probe in 24s  meshnet explain k802\n"
        "- close  k7f2      out  web               api:8080          mtls   1.2M   closed\n"
    )
    assert result.stderr.startswith("12 events lost: this reader was too slow\nerror: the sidecar at ")
    assert result.exit_code == 4


def test_follow_as_jsonl_is_the_events_as_they_came(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(*EVENTS)
    lines = meshnet("conns", "--follow", "-o", "jsonl").stdout.splitlines()
    assert [msgspec.json.decode(line, type=ConnectionEvent) for line in lines] == list(EVENTS)


def test_follow_filters_events_and_can_print_ids_only(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(*EVENTS)
    assert meshnet("conns", "-f", "--failed", "-o", "name").stdout == "k900\nk802\n"


def test_follow_tells_when_the_sidecar_refuses(meshnet: Meshnet, sidecar: Sidecar) -> None:
    sidecar.will_answer(Refused(error="too many followers", fix="stop another one"))
    result = meshnet("conns", "-f", "--no-header")
    assert (result.exit_code, result.stderr) == (1, "error: too many followers\nfix: stop another one\n")


def test_ctrl_c_is_the_ordinary_end_of_follow(sidecar: Sidecar) -> None:
    sidecar.will_answer(EVENTS[0])
    sidecar.hold = True
    with run_meshnet("conns", "-f", "--no-header", "--socket", str(sidecar.path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("+ open   k7f2")
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=10) == ("", "")
        assert process.returncode == 0
    sidecar.later.put(None)


def test_a_reader_that_goes_away_ends_follow_without_a_word(sidecar: Sidecar) -> None:
    sidecar.will_answer(EVENTS[0])
    sidecar.hold = True
    with run_meshnet("conns", "-f", "--socket", str(sidecar.path)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        process.stdout.close()
        sidecar.later.put(msgspec.json.encode(EVENTS[-1]))
        sidecar.later.put(None)
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(timeout=10) == 1
