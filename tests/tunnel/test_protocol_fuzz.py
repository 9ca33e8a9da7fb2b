"""The invariant: whatever a peer sends, `receive` returns frames or raises TunnelError, never anything else."""

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnet.codec import frames
from meshnet.codec.frames import (
    HEADER_SIZE,
    MAX_DATA,
    Data,
    Fin,
    Frame,
    GoAway,
    Open,
    Opened,
    Ping,
    Pong,
    Refused,
    Reset,
)
from meshnet.errors import TunnelError
from meshnet.tunnel.protocol import Role, Tunnel

OPEN = Open(host="10.0.0.1", port=80, service="web:80", id="c-1")
ALL: list[Frame] = [
    OPEN,
    Opened(),
    Refused(reason="authz.denied", policy="lockdown", detail="nobody may"),
    Data(memoryview(b"hello")),
    Data(memoryview(b"x" * MAX_DATA)),
    Fin(),
    Reset(reason="peer.rst"),
    Ping(),
    Pong(),
    GoAway(),
]
ENCODED = [frames.encode(frame) for frame in ALL]
GOOD_FOR_A_SERVER = b"".join(
    frames.encode(frame)
    for frame in (Ping(), OPEN, Data(memoryview(b"early")), Data(memoryview(b"more")), Reset(reason="drain"))
)
STATES = ["fresh", "asked", "opened", "reset", "refused", "finished", "finished and reset", "over", "asked again"]

anything = st.binary(max_size=300)
plausible = st.lists(st.sampled_from(ENCODED), max_size=6).map(b"".join)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid stream with a few bytes changed, cut out or put in."""
    stream = bytearray(draw(st.one_of(st.just(GOOD_FOR_A_SERVER), plausible)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(stream)))
        stream[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(stream)


def tunnel_in(role: Role, state: str) -> Tunnel:
    tunnel = Tunnel(role)
    if state == "fresh":
        return tunnel
    if role is Role.SERVER:
        tunnel.receive(ENCODED[0])
    else:
        tunnel.open(OPEN)
    if state == "refused" and role is Role.SERVER:
        tunnel.refused(Refused(reason="authz.denied"))
    if state in ("asked", "refused"):
        return tunnel
    if role is Role.SERVER:
        tunnel.opened()
    else:
        tunnel.receive(frames.encode(Opened()))
    if state in ("finished", "finished and reset", "over", "asked again"):
        tunnel.fin()
    if state in ("reset", "finished and reset"):
        tunnel.reset("drain")
    if state in ("over", "asked again"):
        tunnel.receive(frames.encode(Fin()))
    if state == "asked again" and role is Role.CLIENT:
        tunnel.open(OPEN)
    elif state == "asked again":
        tunnel.receive(ENCODED[0])
    return tunnel


def hear(tunnel: Tunnel, pieces: Iterable[bytes]) -> tuple[list[Frame | bytes], bool]:
    """The frames up to an error, and whether there was one; anything but TunnelError fails the test."""
    heard: list[Frame | bytes] = []
    for piece in pieces:
        try:
            read = tunnel.receive(piece)
        except TunnelError:
            with pytest.raises(TunnelError):
                tunnel.receive(b"")
            assert not tunnel.idle
            return heard, True
        heard += [bytes(frame.payload) if isinstance(frame, Data) else frame for frame in read]
        assert len(tunnel._reader._held) < HEADER_SIZE + MAX_DATA
    return heard, False


@settings(max_examples=250)
@given(
    role=st.sampled_from(Role),
    state=st.sampled_from(STATES),
    stream=st.one_of(anything, plausible, mutated()),
)
def test_hostile_bytes_give_frames_or_one_tunnel_error(role: Role, state: str, stream: bytes) -> None:
    whole, whole_failed = hear(tunnel_in(role, state), [stream])
    single, single_failed = hear(tunnel_in(role, state), (stream[at : at + 1] for at in range(len(stream))))
    assert whole_failed == single_failed
    if not whole_failed:
        assert whole == single


@settings(max_examples=150)
@given(
    payload=st.one_of(st.binary(max_size=200), st.text('{}[]":,0123456789\\ueE.-hostprt', max_size=200).map(str.encode))
)
@pytest.mark.parametrize("kind", [1, 3, 5])
def test_hostile_json_is_a_tunnel_error(kind: int, payload: bytes) -> None:
    reader = frames.Reader()
    try:
        (frame,) = reader.feed(bytes([kind]) + len(payload).to_bytes(3, "big") + payload)
    except TunnelError:
        return
    assert isinstance(frame, Open | Refused | Reset)
    assert reader.feed(frames.encode(frame)) == [frame]
