"""The native relay under tools that take minutes: libFuzzer, and valgrind. `scripts/test --deep` runs these."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meshnet.codec.frames import HEADER_SIZE, Data, Fin, GoAway, Open, Opened, Pong, Refused, Reset, encode
from tests.relay.native.builds import CONTRACT, FUZZERS, NATIVE, copy, run, start

pytestmark = pytest.mark.deep

FUZZ_SECONDS = int(os.environ.get("MESHNET_FUZZ_SECONDS", "120"))

OPEN = Open(host="10.0.0.2", port=8080, service="api:8080", source="10.0.0.1:40000", id="8s0t4zfm", deadline=2000)


def frame_seeds() -> Iterator[bytes]:
    frames = [encode(Data(memoryview(bytes(size)))) for size in (1, 300, 16380)]
    frames += [encode(frame) for frame in (Fin(), Pong(), GoAway(), Reset(reason="peer.rst"))]
    for step in (0, 6, 254):  # the first byte says in which pieces, and whether an answer to OPEN is due
        yield bytes([step]) + b"".join(frames)
        yield bytes([step + 1]) + b"".join([encode(Opened()), *frames])
        yield bytes([step + 1]) + encode(Refused(reason="authz.denied", policy="strict", detail="not you"))


def open_seeds() -> Iterator[bytes]:
    yield encode(OPEN)[HEADER_SIZE:]
    yield encode(Open(host="fd00::2", port=1, source="[fd00::1]:65535", id="x"))[HEADER_SIZE:]


@pytest.mark.timeout(FUZZ_SECONDS + 120)
@pytest.mark.parametrize(("parser", "seeds"), [("frame", frame_seeds), ("open", open_seeds)])
def test_the_fuzzer_finds_nothing(parser: str, seeds: Callable[[], Iterator[bytes]], tmp_path: Path) -> None:
    program, corpus = tmp_path / parser, tmp_path / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds()):
        (corpus / str(number)).write_bytes(seed)
    sanitize = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=undefined"]
    source = Path(__file__).with_name(FUZZERS[parser])
    run("clang", "-g", "-O1", *sanitize, "-I", NATIVE, source, NATIVE / f"{parser}.c", "-o", program)
    said = run(program, f"-max_total_time={FUZZ_SECONDS}", "-max_len=70000", f"-artifact_prefix={tmp_path}/", corpus)
    assert re.search(r"Done [1-9]\d* runs", said), said[-4000:]


@pytest.mark.timeout(3600)
def test_the_contract_is_clean_under_valgrind(tmp_path: Path) -> None:
    """Nothing invalid, uninitialised or lost that our own code has a part in; Python's own is its own affair."""
    copy(tmp_path)
    log = tmp_path / "memcheck"
    memcheck = ("valgrind", f"--log-file={log}", "--num-callers=40", "--error-limit=no", "--fullpath-after=")
    memcheck += ("--leak-check=full", "--show-leak-kinds=definite,indirect")
    with start(tmp_path, *memcheck, tests=[*CONTRACT, "-m", "not deep"], MESHNET_TEST_SLOWNESS="15") as process:
        output = process.communicate()[0]
    reported = re.split(r"^==\d+== $", log.read_text(errors="replace"), flags=re.MULTILINE)
    ours = "\n".join(block for block in reported if "/meshnet/relay/native/" in block)
    assert "ERROR SUMMARY" in reported[-1]
    assert not ours, ours[:8000]
    assert process.returncode == 0, output[-4000:]
    assert re.search(r"\d\d+ passed", output), output
