"""One call of the gRPC health service (grpc.health.v1.Health/Check), over HTTP/2 in plain text, as a kubelet makes it.

The two messages have one field each (grpc/health/v1/health.proto), so they are written and read here; HTTP/2 is h2's.
"""

import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, DataReceived, ResponseReceived, StreamEnded, StreamReset, TrailersReceived
from h2.exceptions import ProtocolError

_RECEIVE_SIZE = 8192
_MOST = 1024  # bytes of an answer: one field
_PREFIX = 5  # bytes before a message: whether it is compressed, and its length
_SERVICE_FIELD = 0x0A  # field 1, text
_STATUS_FIELD = 0x08  # field 1, number


async def serving_status(stream: trio.SocketStream, authority: str, service: str, agent: str) -> int:
    """The ServingStatus of `service`, 1 is SERVING; "" is the whole server.

    Raises ValueError that says what was answered instead, and what the stream raises.
    """
    connection = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
    connection.initiate_connection()
    number = connection.get_next_available_stream_id()
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/grpc.health.v1.Health/Check",
        ":authority": authority,
        "content-type": "application/grpc",
        "user-agent": agent,
        "te": "trailers",
    }
    connection.send_headers(number, list(headers.items()))
    connection.send_data(number, _request(service), end_stream=True)
    body, said = bytearray(), dict[str, str]()
    while True:
        await stream.send_all(connection.data_to_send())
        data = await stream.receive_some(_RECEIVE_SIZE)
        if not data:
            raise ValueError("the connection ended before an answer")
        try:
            events = connection.receive_data(data)
        except (ProtocolError, UnicodeDecodeError) as error:
            raise ValueError(f"that is no gRPC: {type(error).__name__}") from None
        for event in events:
            match event:
                case ResponseReceived(headers=found) | TrailersReceived(headers=found):
                    said |= {str(name): str(value) for name, value in found or ()}
                case DataReceived(data=piece):
                    body += piece or b""
                    if len(body) > _MOST:
                        raise ValueError("an answer so long is not the health service's")
                case StreamEnded():
                    return _status(bytes(body), said)
                case StreamReset() | ConnectionTerminated():
                    raise ValueError("the server ended the call")
                case _:
                    pass


def _request(service: str) -> bytes:
    text = service.encode()
    message = bytes([_SERVICE_FIELD]) + _varint(len(text)) + text if text else b""
    return b"\0" + len(message).to_bytes(4, "big") + message


def _varint(number: int) -> bytes:
    """As Protocol Buffers writes it: seven bits a byte, the low ones first."""
    data = bytearray()
    while number > 0x7F:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*data, number])


def _status(body: bytes, said: dict[str, str]) -> int:
    if said.get(":status") != "200" or said.get("grpc-status", "0") != "0":
        code = said.get("grpc-status") or f"HTTP {said.get(':status')}"
        raise ValueError(f"the health service answers with {code} {said.get('grpc-message', '')}".rstrip())
    message = body[_PREFIX:]
    if not message:  # UNKNOWN is 0, and nothing stands for it
        return 0
    if len(message) != 2 or message[0] != _STATUS_FIELD:
        raise ValueError("the health service's answer makes no sense")
    return message[1]
