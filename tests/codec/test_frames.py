import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnet.codec import frames
from meshnet.codec.frames import (
    MAX_CONTROL,
    MAX_DATA,
    Check,
    Data,
    Fin,
    Frame,
    GoAway,
    Open,
    Opened,
    Ping,
    Pong,
    Reader,
    Refused,
    Reset,
)
from meshnet.errors import Reason, TunnelError

OPEN = Open(
    host="10.0.0.1",
    port=5432,
    service="db:5432",
    source="10.0.0.9:41000",
    id="c-1",
    traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    deadline=5000,
)
CONTROL: list[Frame] = [
    OPEN,
    Open(host="fd00::1", port=1),
    Open(host="fd00::1", port=1, check=Check()),
    Open(host="fd00::1", port=1, service="x" * 330, check=Check(send="\x01" * 256, expect="\x02" * 256)),
    Opened(),
    Refused(reason=Reason.AUTHZ_DENIED, policy="default/lockdown", detail="nobody may"),
    Fin(),
    Reset(reason=Reason.PEER_RST),
    Ping(),
    Pong(),
    GoAway(),
]
ids = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=64)
shown = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=330)
controls = st.one_of(
    st.sampled_from(CONTROL),
    st.builds(Open, host=st.ip_addresses().map(str), port=st.integers(1, 65535), id=ids, source=ids, service=shown),
    st.builds(Refused, reason=st.sampled_from(Reason), policy=shown, detail=st.text(max_size=1000)),
)


def frame_bytes(kind: int, payload: bytes) -> bytes:
    return bytes([kind]) + len(payload).to_bytes(3, "big") + payload


def owned(frames_read: list[Frame]) -> list[Frame | bytes]:
    return [bytes(frame.payload) if isinstance(frame, Data) else frame for frame in frames_read]


@pytest.mark.parametrize(
    ("frame", "encoded"),
    [
        (Open(host="10.0.0.1", port=80), b'\x01\x00\x00\x1d{"host":"10.0.0.1","port":80}'),
        (Opened(), b"\x02\x00\x00\x00"),
        (Refused(reason="authz.denied", policy="p"), b'\x03\x00\x00\x26{"reason":"authz.denied","policy":"p"}'),
        (Fin(), b"\x04\x00\x00\x00"),
        (Reset(reason="drain"), b'\x05\x00\x00\x12{"reason":"drain"}'),
        (Ping(), b"\x06\x00\x00\x00"),
        (Pong(), b"\x07\x00\x00\x00"),
        (GoAway(), b"\x08\x00\x00\x00"),
        (Data(memoryview(b"abc")), b"\x00\x00\x00\x03abc"),
    ],
)
def test_a_frame_looks_like_this_on_the_wire(frame: Frame, encoded: bytes) -> None:
    assert frames.encode(frame) == encoded
    assert Reader().feed(encoded) == [frame]


@pytest.mark.parametrize("size", [1, 255, 256, MAX_DATA])
def test_a_data_header_goes_before_its_payload(size: int) -> None:
    payload = b"x" * size
    assert frames.data_header(size) == b"\x00" + size.to_bytes(3, "big")
    assert owned(Reader().feed(frames.data_header(size) + payload)) == [payload]


@pytest.mark.parametrize("size", [-1, 0, MAX_DATA + 1])
def test_a_data_header_of_a_size_that_no_frame_has_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="1 to 16380"):
        frames.data_header(size)


@given(control=controls)
def test_what_was_encoded_is_read_back(control: Frame) -> None:
    encoded = frames.encode(control)
    assert len(encoded) <= 4 + MAX_CONTROL
    (read,) = Reader().feed(encoded)
    if isinstance(control, Open):
        assert isinstance(read, Open)
        assert msgspec.structs.replace(read, host="") == msgspec.structs.replace(control, host="")
    elif isinstance(control, Refused):
        assert isinstance(read, Refused)
        assert (read.reason, read.policy) == (control.reason, control.policy)
    else:
        assert read == control


@settings(max_examples=60)
@given(
    st.lists(st.one_of(controls, st.binary(min_size=1, max_size=50).map(lambda b: Data(memoryview(b)))), max_size=8),
    st.data(),
)
def test_pieces_do_not_matter(sent: list[Frame], data: st.DataObject) -> None:
    stream = b"".join(frames.encode(frame) for frame in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    reader, read = Reader(), []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        read += owned(reader.feed(stream[begin:end]))
    one_by_one = Reader()
    assert read == owned(Reader().feed(stream))
    assert read == [frame for byte in stream for frame in owned(one_by_one.feed(bytes([byte])))]
    assert len(read) == len(sent)


def test_a_read_that_is_one_data_frame_is_not_copied() -> None:
    buffer = bytearray(frames.data_header(3) + b"abc")
    (frame,) = Reader().feed(memoryview(buffer))
    assert isinstance(frame, Data)
    buffer[4:] = b"xyz"
    assert bytes(frame.payload) == b"xyz"


def test_payloads_in_the_middle_of_a_read_are_not_copied_either() -> None:
    buffer = bytearray(frames.encode(Ping()) + frames.data_header(3) + b"abc" + frames.encode(Ping()))
    _, frame, _ = Reader().feed(memoryview(buffer))
    assert isinstance(frame, Data)
    buffer[8:11] = b"xyz"
    assert bytes(frame.payload) == b"xyz"


def test_the_payload_of_a_frame_in_two_pieces_outlives_both_of_them() -> None:
    reader = Reader()
    first, second = bytearray(b"\x00\x00\x00\x04ab"), bytearray(b"cd")
    assert reader.feed(first) == []
    (frame,) = reader.feed(second)
    assert isinstance(frame, Data)
    first[:], second[:] = b"######", b"##"
    assert reader.feed(b"\x00\x00\x00\x04ef") == []
    assert bytes(frame.payload) == b"abcd"


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        (b"\x09\x00\x00\x00", "9 is not a valid Kind"),
        (b"\xff\xff\xff\xff", "255 is not a valid Kind"),
        (b"\x00\x00\x00\x00", "0 bytes in a DATA frame"),
        (b"\x00\x00\x3f\xfd", "16381 bytes in a DATA frame"),
        (b"\x01\x00\x10\x01", "4097 bytes in a OPEN frame"),
        (b"\x02\x00\x00\x01", "1 bytes in a OPENED frame"),
        (b"\x04\x00\x00\x01", "1 bytes in a FIN frame"),
        (b"\x06\x00\x00\x08", "8 bytes in a PING frame"),
        (b"\x07\x00\x00\x08", "8 bytes in a PONG frame"),
        (b"\x08\xff\xff\xff", "16777215 bytes in a GOAWAY frame"),
    ],
)
def test_a_bad_header_is_an_error_before_its_payload_comes(stream: bytes, why: str) -> None:
    with pytest.raises(TunnelError, match=why):
        Reader().feed(stream)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"host":"10.0.0.1"}',
        b'{"host":"10.0.0.1","port":0}',
        b'{"host":"10.0.0.1","port":65536}',
        b'{"host":"10.0.0.1","port":"80"}',
        b'{"host":"10.0.0.1","port":80.5}',
        b'{"host":"localhost","port":80}',
        b'{"host":"","port":80}',
        b'{"host":"010.0.0.1","port":80}',
        b'{"host":"fe80::1%eth0","port":80}',
        b'{"host":"::ffff:10.0.0.1%1","port":80}',
        b'{"host":"10.0.0.1","port":80}{}',
        b'{"host":"10.0.0.1","port":80,"deadline":-1}',
        b'{"host":"10.0.0.1","port":80,"deadline":2147483648}',
        b'{"host":"10.0.0.1","port":80,"id":"%s"}' % (b"i" * 65),
        b'{"host":"10.0.0.1","port":80,"id":"a b"}',
        b'{"host":"10.0.0.1","port":80,"id":"a\\n"}',
        b'{"host":"10.0.0.1","port":80,"service":"%s"}' % (b"s" * 331),
        b'{"host":"10.0.0.1","port":80,"service":"\\u001b[2J"}',
        b'{"host":"10.0.0.1","port":80,"service":"\\ud800x"}',
        b'{"host":"10.0.0.1","port":80,"service":"\xff"}',
        b'{"host":"10.0.0.1","port":80,"source":"%s"}' % (b"1" * 65),
        b'{"host":"10.0.0.1","port":80,"traceparent":"%s"}' % (b"0" * 129),
        b'{"host":"10.0.0.1","port":80,"new":' + b"[" * 4000,
    ],
)
def test_a_bad_open_is_an_error(payload: bytes) -> None:
    with pytest.raises(TunnelError, match="malformed frame"):
        Reader().feed(frame_bytes(1, payload))


@pytest.mark.parametrize("reason", ["", "Upper", "a b", "a\\n", "9", "x" * 65, "\\u001b"])
def test_a_reason_that_is_not_a_code_is_an_error(reason: str) -> None:
    for kind in (3, 5):
        with pytest.raises(TunnelError, match="malformed frame"):
            Reader().feed(frame_bytes(kind, b'{"reason":"%s"}' % reason.encode()))


def test_every_reason_of_ours_is_a_code() -> None:
    for reason in Reason:
        assert Reader().feed(frames.encode(Reset(reason=reason))) == [Reset(reason=reason.value)]


@pytest.mark.parametrize(
    ("written", "read"),
    [("::ffff:10.0.0.1", "10.0.0.1"), ("FD00:0:0::1", "fd00::1"), ("::1", "::1"), ("10.0.0.1", "10.0.0.1")],
)
def test_an_address_has_one_spelling(written: str, read: str) -> None:
    assert Reader().feed(frames.encode(Open(host=written, port=80))) == [Open(host=read, port=80)]


def test_a_field_that_a_newer_peer_added_is_passed_over() -> None:
    payload = b'{"host":"10.0.0.1","port":80,"new":{"a":[1,2,{}]}}'
    assert Reader().feed(frame_bytes(1, payload)) == [Open(host="10.0.0.1", port=80)]


@pytest.mark.parametrize(
    "frame",
    [
        Open(host="localhost", port=80),
        Open(host="10.0.0.1", port=0),
        Open(host="10.0.0.1", port=80, id="i" * 65),
        Refused(reason=""),
        Reset(reason="not a code"),
        Data(memoryview(b"")),
    ],
)
def test_what_no_peer_would_take_is_not_encoded(frame: Frame) -> None:
    with pytest.raises(ValueError):
        frames.encode(frame)


def test_a_detail_is_cut_and_cleaned_so_that_it_always_fits() -> None:
    detail = "\x1b[31mrefused\r\n" + "\U0001f4a5" * 1000
    (read,) = Reader().feed(frames.encode(Refused(reason="connect.refused", policy='"' * 330, detail=detail)))
    assert isinstance(read, Refused)
    assert read.detail == (" [31mrefused " + "\U0001f4a5" * 1000)[:512]


@pytest.mark.parametrize("kind", [0, 1])
def test_no_more_than_one_frame_is_ever_held(kind: int) -> None:
    reader = Reader()
    size = MAX_DATA if kind == 0 else MAX_CONTROL
    reader.feed(bytes([kind]) + size.to_bytes(3, "big"))
    for _ in range(size - 1):
        assert reader.feed(b" ") == []
    assert len(reader._held) == 4 + size - 1


def test_a_piece_that_looks_like_a_frame_is_still_the_rest_of_one() -> None:
    reader, rest = Reader(), frames.data_header(3) + b"abc"
    assert reader.feed(frames.data_header(1 + len(rest)) + b"x") == []
    assert owned(reader.feed(rest)) == [b"x" + rest]
