"""TLS by Python's ssl module, on non-blocking sockets that the Python relay can take over."""

import errno
import socket
import ssl
from collections.abc import Callable

import trio

from meshnet.errors import ConnectionFailed, Reason
from meshnet.net.strand import in_task
from meshnet.net.tls import ALPN, Returned, Ticket, handshake_timeout, not_verified, peer_identity

_RECEIVE_SIZE = 32768  # more than one record

# What the other side's alert may say about our certificate (RFC 8446, 6.2), as OpenSSL spells it.
_OUR_CERTIFICATE = frozenset(
    {
        "SSLV3_ALERT_BAD_CERTIFICATE",
        "SSLV3_ALERT_CERTIFICATE_EXPIRED",
        "SSLV3_ALERT_CERTIFICATE_REVOKED",
        "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
        "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE",
        "TLSV13_ALERT_CERTIFICATE_REQUIRED",
        "TLSV1_ALERT_UNKNOWN_CA",
    }
)


class PythonChannel:
    """See meshnet.net.tls.Channel."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        """The handshake is over. Raises ConnectionFailed(tls.*)."""
        if sock.selected_alpn_protocol() != ALPN:
            raise ConnectionFailed(Reason.TLS_HANDSHAKE, f"the peer does not speak {ALPN}")
        self.identity, self.good_until = peer_identity(sock.getpeercert(binary_form=True) or b"")
        self.sock = sock
        self.context: object = sock.context
        self.version = sock.version() or ""
        cipher = sock.cipher()
        self.cipher = cipher[0] if cipher else ""
        self.resumed = bool(sock.session_reused)

    @property
    def ticket(self) -> Ticket | None:
        return self.sock.session

    async def send_all(self, data: bytes) -> None:
        await in_task()
        view = memoryview(data)
        while view:
            try:
                view = view[self.sock.send(view) :]
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(self.sock)
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(self.sock)
            except OSError:
                self._hear_refusal()
                raise

    def _hear_refusal(self) -> None:
        """Raises ConnectionFailed(tls.no_identity) if a peer that hung up has said before that it does not take us."""
        try:
            self.sock.recv(1)
        except ssl.SSLError as error:
            if error.reason in _OUR_CERTIFICATE:
                raise _failure(error) from error
        except OSError:
            pass

    def send_now(self, data: bytes) -> None:
        self.sock.send(data)

    async def receive(self) -> bytes:
        await in_task()
        if not self.sock.pending():
            await trio.lowlevel.wait_readable(self.sock)  # most often the peer has nothing to say yet
        while True:
            try:
                return self.sock.recv(_RECEIVE_SIZE)
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(self.sock)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(self.sock)
            except ssl.SSLError as error:
                # In TLS 1.3 a peer that refuses our certificate says so only after our handshake is over.
                raise _failure(error) from error

    def receive_now(self) -> bytes | None:
        try:
            return self.sock.recv(_RECEIVE_SIZE)
        except ssl.SSLWantReadError:
            return None

    def serve(self, host: str) -> None:
        pass  # there are no orders for its relay

    def stop_serving(self, host: str) -> None:
        pass

    def last_ends(self) -> tuple[str, str]:
        return "", ""

    def shut(self) -> None:
        # Not self.sock.shutdown: that of an SSLSocket forgets its TLS, which somebody is about to use.
        socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        self.sock.close()


class PythonTls:
    """See meshnet.net.tls.Tls."""

    def depot(self, come_back: Callable[[Returned], None]) -> None:
        return None

    def context(self, certificate: str, key: str, bundle: str, *, is_server: bool) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # a SPIFFE id is checked instead
        context.verify_mode = ssl.CERT_REQUIRED
        context.set_alpn_protocols([ALPN])
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(bundle)
        if is_server:
            context.num_tickets = 1  # one tunnel resumes one session; a second ticket would be work for nobody
        return context

    async def connect(
        self, sock: socket.socket, context: object, ticket: Ticket | None, timeout: float
    ) -> PythonChannel:
        assert isinstance(context, ssl.SSLContext)
        assert ticket is None or isinstance(ticket, ssl.SSLSession)
        return await _channel(sock, context, False, ticket, timeout)

    async def accept(self, sock: socket.socket, context: object, timeout: float) -> PythonChannel:
        assert isinstance(context, ssl.SSLContext)
        return await _channel(sock, context, True, None, timeout)


async def _channel(
    plain: socket.socket, context: ssl.SSLContext, is_server: bool, session: ssl.SSLSession | None, timeout: float
) -> PythonChannel:
    await in_task()
    sock: socket.socket = plain
    try:
        plain.getpeername()  # asked by wrap_socket too, which leaves its own socket unclosed if the peer has reset it
        sock = secure = context.wrap_socket(
            plain, server_side=is_server, do_handshake_on_connect=False, session=session
        )
        with trio.fail_after(timeout):
            await _handshake(secure)
        return PythonChannel(secure)
    except OSError as error:
        sock.close()
        raise _failure(error) from error
    except trio.TooSlowError:
        sock.close()
        raise handshake_timeout(timeout, not is_server) from None
    except BaseException:
        sock.close()
        raise


async def _handshake(sock: ssl.SSLSocket) -> None:
    while True:
        try:
            sock.do_handshake()
            return
        except ssl.SSLWantReadError:
            await trio.lowlevel.wait_readable(sock)
        except ssl.SSLWantWriteError:
            await trio.lowlevel.wait_writable(sock)


def _failure(error: OSError) -> ConnectionFailed:
    """What an error of the ssl module means to an operator."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return not_verified(error.verify_code, error.verify_message)
    if isinstance(error, ssl.SSLEOFError | ConnectionResetError | BrokenPipeError) or error.errno == errno.ENOTCONN:
        return ConnectionFailed(Reason.TLS_HANDSHAKE, "the peer hung up during the handshake")
    if isinstance(error, ssl.SSLError):
        if error.reason in _OUR_CERTIFICATE:
            return ConnectionFailed(Reason.TLS_NO_IDENTITY, f"the peer does not take our certificate: {error.reason}")
        return ConnectionFailed(Reason.TLS_HANDSHAKE, f"TLS: {error.reason or error}")
    return ConnectionFailed(Reason.TLS_HANDSHAKE, f"TLS: {error.strerror or error}")
