"""Every reason code has a test that produces it and looks at the record, and is told with cause and cure."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshnet.errors import EndedBy, Reason
from meshnet.model.connection import Connection, Direction, Peer, ReasonView, State
from meshnet_cli.reasons import ADVICE
from tests.produced import has_to_be_told, note

ROOT = Path(__file__).parent
README = (ROOT.parent / "README.md").read_text()


def marks(tree: ast.AST) -> Iterator[str]:
    """What the marks `produces` of its tests say. At each run each of these tests proves what its own says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.produces":
                    yield from (ast.literal_eval(argument) for argument in mark.args)


PRODUCED = [code for file in sorted(ROOT.rglob("test_*.py")) for code in marks(ast.parse(file.read_text()))]


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_a_test_that_produces_it(reason: Reason) -> None:
    assert reason in PRODUCED, f'no test is marked with @pytest.mark.produces("{reason}")'


def test_no_test_is_to_produce_what_is_no_reason() -> None:
    assert set(PRODUCED) <= set(Reason)


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_documented_with_its_cause_and_its_cure(reason: Reason) -> None:
    advice = ADVICE[reason]
    assert f"| `{reason}` | {advice.cause} | {advice.cure} |\n" in (ROOT.parent / "docs" / "reasons.md").read_text()


def test_a_mark_that_is_not_true_fails_its_test() -> None:
    record = Connection(
        id="k802",
        direction=Direction.INBOUND,
        state=State.FAILED,
        source=Peer(),
        destination=Peer(),
        reason=ReasonView(code=Reason.IDLE, ended_by=EndedBy.POLICY),
    )
    with has_to_be_told(["idle"]):
        note([record])
    with pytest.raises(AssertionError, match=r"ended with drain, as"), has_to_be_told(["idle", "drain"]):
        note([record])
    with pytest.raises(AssertionError, match=r"ended with idle, as"), has_to_be_told(["idle"]):
        pass  # what was told before is another test's


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_a_cause_and_a_cure_and_stands_in_the_readme(reason: Reason) -> None:
    advice = ADVICE[reason]
    assert advice.cause
    assert advice.cure
    assert re.search(rf"^\| `{re.escape(reason)}` \| \S", README, re.MULTILINE)
