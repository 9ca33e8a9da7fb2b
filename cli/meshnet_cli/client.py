"""Asking a sidecar over its admin socket: one JSON line there, one or more JSON lines back."""

import socket
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click
import msgspec

from meshnet.errors import CommandError
from meshnet.model.admin import Refused, Request
from meshnet_cli.configuration import admin_socket
from meshnet_cli.output import DURATION, with_sudo

EXIT_FAILED, EXIT_UNREACHABLE, EXIT_PERMISSION, EXIT_TIMEOUT = 1, 4, 5, 6

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def socket_option(command: F) -> F:
    """--socket. The command gets `socket_path`."""
    return click.option(
        "--socket",
        "socket_path",
        metavar="PATH",
        envvar="MESHNET_SOCKET",
        default=admin_socket,
        show_default="admin.socket of the settings",
        help="The sidecar's admin socket.",
    )(command)


def admin_options(command: F) -> F:
    """--socket and --timeout. The command gets `socket_path` and `timeout` in seconds."""
    timeout = click.option(
        "--timeout", type=DURATION, default="5s", show_default=True, help="How long to wait for the sidecar."
    )
    return socket_option(timeout(command))


def ask(socket_path: str, request: Request, answer: type[T], *, timeout: float = 5.0) -> T:
    """The sidecar's one answer to `request`.

    Raises CommandError: code 1 if the sidecar refused, 4 if it is not there, 5 if we may not ask, 6 after `timeout`.
    """
    with _connected(socket_path, request, timeout) as sock, sock.makefile("rb") as lines:
        try:
            line = lines.readline()
        except TimeoutError as error:
            raise _slow(socket_path, timeout) from error
        except ConnectionResetError:
            line = b""
    if not line.endswith(b"\n"):
        raise _hung_up(socket_path)
    return _decoded(line, answer)


def stream(socket_path: str, request: Request, answer: type[T], *, timeout: float = 5.0) -> Iterator[T]:
    """The sidecar's answers to `request` until the caller stops asking; waits for each as long as it takes.

    Raises CommandError as `ask` does, at once if the sidecar is not there; code 4 also when it ends the stream.
    """
    sock = _connected(socket_path, request, timeout)
    sock.settimeout(None)
    return _answers(sock, socket_path, answer)


def _answers(sock: socket.socket, path: str, answer: type[T]) -> Iterator[T]:
    with sock, sock.makefile("rb") as lines:
        try:
            for line in lines:
                yield _decoded(line, answer)
        except ConnectionResetError:
            pass
    raise _hung_up(path)


def _connected(path: str, request: Request, timeout: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(path)
        sock.sendall(msgspec.json.encode(request) + b"\n")
    except PermissionError as error:
        sock.close()
        raise CommandError(
            f"may not open {path}",
            why="the admin socket belongs to root and the meshnet group",
            fix=with_sudo(),
            code=EXIT_PERMISSION,
        ) from error
    except TimeoutError as error:
        sock.close()
        raise _slow(path, timeout) from error
    except OSError as error:
        sock.close()
        raise CommandError(
            f"no sidecar answers at {path}",
            why=f"{error.strerror or error}; is the sidecar running?",
            fix="sudo meshnet up, or meshnet proxy in the foreground; --socket PATH if it listens elsewhere",
            code=EXIT_UNREACHABLE,
        ) from error
    return sock


class _Kind(msgspec.Struct):
    kind: str = ""


def _decoded(line: bytes, answer: type[T]) -> T:
    try:
        if msgspec.json.decode(line, type=_Kind).kind == "Error":
            refused = msgspec.json.decode(line, type=Refused)
            raise CommandError(refused.error, fix=refused.fix, code=EXIT_FAILED)
        return msgspec.json.decode(line, type=answer)
    except msgspec.DecodeError as error:
        raise CommandError(
            "the sidecar's answer makes no sense to this command",
            why=f"{error}; the two may be of different versions",
            fix="restart the sidecar after an upgrade, then compare: meshnet --version",
            code=EXIT_FAILED,
        ) from error


def _slow(path: str, timeout: float) -> CommandError:
    return CommandError(
        f"the sidecar at {path} did not answer within {timeout:g}s",
        why="it is overloaded or stuck",
        fix="try again with --timeout 30s, and look at the sidecar's log",
        code=EXIT_TIMEOUT,
    )


def _hung_up(path: str) -> CommandError:
    return CommandError(
        f"the sidecar at {path} closed the connection",
        why="it was stopped or restarted meanwhile",
        fix="meshnet status",
        code=EXIT_UNREACHABLE,
    )
