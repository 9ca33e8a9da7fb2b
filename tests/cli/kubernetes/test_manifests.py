"""Manifests as text: read as kubectl reads them, and printed so that it reads the same again."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnet.errors import ConfigError
from meshnet_cli.kubernetes.manifests import read_documents, write_documents
from tests.cli.kubernetes.manifests import FOLDER, read


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("yes", True), ("off", False), ("~", None), ("0644", 420), ("0o644", 420), ("0x1F", 31), ("1_000", 1000),
        ("1e3", 1000.0), ("08", 8.0), ("1.5", 1.5), ("22:22", "22:22"), ("2026-11-01", "2026-11-01"), ("=", "="),
        ("'yes'", "yes"), ("'0644'", "0644"), ("1.2.3", "1.2.3"), ("y", "y"), ("!!str 1", "1"),
    ],
)  # fmt: skip
def test_what_is_text_and_what_is_not(written: str, value: object) -> None:
    (document,) = read_documents(f"key: {written}\n", "x.yaml")
    assert document == {"key": value}
    assert type(document["key"]) is type(value) or written == "y"  # type: ignore[index]  # a mapping, it says above


@pytest.mark.parametrize("text", ["y", "N"])
def test_a_letter_that_is_text_for_some_is_printed_as_it_came(text: str) -> None:
    assert write_documents(read_documents(f"{text}: {text}", ""), "yaml") == f"{text}: {text}\n"
    assert write_documents(read_documents(f"'{text}': '{text}'", ""), "yaml") == f"'{text}': '{text}'\n"


def test_keys_are_text() -> None:
    assert read_documents("{8080: a, true: b, 1.5: c}", "") == [{"8080": "a", "true": "b", "1.5": "c"}]


def test_anchors_are_written_out_and_merged() -> None:
    text = "a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n"
    (document,) = read_documents(text, "")
    assert write_documents([document], "yaml") == "a:\n  x: 1\nb:\n  x: 1\nc:\n  x: 1\n  y: 2\n"


def test_several_lines_are_printed_as_several_lines() -> None:
    assert write_documents([{"a": "one\ntwo\n"}], "yaml") == "a: |\n  one\n  two\n"


def test_json_is_read_one_document_after_the_other() -> None:
    assert read_documents('\n{"a": 1}\n\t{"b": [true, null]}\n', "x.json") == [{"a": 1}, {"b": [True, None]}]
    assert read_documents("{a: 1}", "x.yaml") == [{"a": 1}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1\n", "x.yaml:2: not valid YAML: "),
        ("a: 1\n\tb: 2\n", "x.yaml:2: not valid YAML: "),
        ("a: !!python/object:os.system {}\n", "x.yaml:1: not valid YAML: could not determine a constructor"),
        ("a: !!binary eA==\n", "x.yaml: not valid YAML: a bytes has no place in a manifest"),
        ("[a]: 1\n", "x.yaml:1: not valid YAML: "),
        ("a: " + "[" * 200 + "]" * 200, "x.yaml: not valid YAML: nested deeper than 100"),
        ("a: \x07\n", "x.yaml: not valid YAML: "),
    ],
)
def test_what_is_no_manifest_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_documents(text, "x.yaml")
    assert str(caught.value).startswith(said)


_TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
_SINGLE = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _TEXT
_VALUES = _SINGLE | st.lists(_SINGLE, max_size=3) | st.dictionaries(_TEXT, st.lists(_SINGLE, max_size=2), max_size=2)


@settings(max_examples=100)
@given(st.lists(st.dictionaries(st.sampled_from(["kind", "y", "8", "a b"]), _VALUES, min_size=1), max_size=2))
def test_what_is_printed_is_read_again_as_it_was(documents: list[object]) -> None:
    assert read_documents(write_documents(documents, "yaml"), "") == documents
    assert read_documents(write_documents(documents, "json"), "") == documents


@given(st.text())
def test_no_text_does_more_than_be_refused(text: str) -> None:
    try:
        documents = read_documents(text, "x.yaml")
    except ConfigError as error:
        assert error.problem.startswith("not valid YAML")  # noqa: PT017  # most texts are YAML: there is nothing to raise
    else:
        assert read_documents(write_documents(documents, "yaml"), "x.yaml") == documents


def test_other_readers_take_nothing_for_something_else() -> None:
    words = read(FOLDER / "multi-document.yaml")[0]
    assert isinstance(words, dict)
    assert all(isinstance(value, str) for value in words["data"].values())
    assert json.loads(write_documents([words], "json")) == words
