"""Real servers, unmodified, each run on a host by an ordinary user of it."""

import shutil
import textwrap
from pathlib import Path

from meshnet_cli.demo.sandbox import search_path
from tests.world import Host, Process, wait_for

# PostgreSQL refuses to be root, and nginx and Redis would change to a user who is not there in a namespace with one.
# In a user namespace below ours the same user has another number, with and without root outside: that of nobody, for
# initdb wants a user with a name.
ORDINARY = ("unshare", "--user", "--map-user=65534", "--map-group=65534", "--ipc", "--")


def start(host: Host, port: int, *command: str | Path) -> Process:
    """The program, listening."""
    process = host.spawn(*ORDINARY, *command, name=Path(command[0]).name)
    _wait_until_listening(process, host, port)
    return process


def _wait_until_listening(process: Process, host: Host, port: int) -> None:
    def listens() -> bool:
        assert process.alive, process.output
        return host.listens(port)

    wait_for(listens, what=f"{process.name} on {host.name}, port {port}")


def nginx(host: Host, port: int, content: bytes) -> Process:
    """Serves `content` as /content."""
    home = host.directory / "nginx"
    home.mkdir()
    (home / "content").write_bytes(content)
    config = home / "nginx.conf"
    config.write_text(
        textwrap.dedent(f"""\
            daemon off;
            error_log stderr;
            pid {home}/pid;
            events {{}}
            http {{
              access_log off;
              client_body_temp_path {home}/body;
              proxy_temp_path {home}/proxy;
              fastcgi_temp_path {home}/fastcgi;
              uwsgi_temp_path {home}/uwsgi;
              scgi_temp_path {home}/scgi;
              server {{
                listen {port};
                listen [::]:{port};
                root {home};
              }}
            }}
            """)
    )
    return start(host, port, "nginx", "-e", "stderr", "-c", config)


def redis(host: Host, port: int) -> Process:
    home = host.directory / "redis"
    home.mkdir()
    return start(
        host,
        port,
        "redis-server",
        *("--port", str(port), "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--dir", home),
    )


def postgres(host: Host, port: int) -> Process:
    """A cluster of its own, whose one user `app` needs no password; it takes plain text and TLS.

    End it by SIGINT: by SIGKILL it leaves shared memory behind.
    """
    binaries = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    data = host.directory / "postgres"
    host.run(*ORDINARY, binaries / "initdb", "-D", data, "-U", "app", "-A", "trust", "-N", "--no-locale", "-E", "UTF8")
    certificate(host, data / "server")
    with (data / "pg_hba.conf").open("a") as rules:
        rules.write("host all all 0.0.0.0/0 trust\n")
    with (data / "postgresql.conf").open("a") as settings:
        settings.write(
            f"listen_addresses = '*'\nport = {port}\nunix_socket_directories = ''\nssl = on\nfsync = off\n"
            "dynamic_shared_memory_type = mmap\nshared_buffers = 8MB\n"
        )
    return start(host, port, binaries / "postgres", "-D", data)


LOGIN = "nobody"
"""Whom sshd lets in: the user that it is itself, as it cannot become another without root."""


def sshd(host: Host, port: int) -> tuple[Process, Path]:
    """Debian's, and a key that it lets in; `known_hosts` beside the key has the server's own, by any name."""
    home = host.directory / "ssh"
    home.mkdir()
    for key in ("host", "client"):
        host.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / key)
    (home / "known_hosts").write_text("* " + (home / "host.pub").read_text())
    # Here nobody may log in, as nowhere else: a shell, and files in the world's folder.
    users = Path("/etc/passwd").read_text().splitlines(keepends=True)
    others = [line for line in users if not line.startswith(f"{LOGIN}:")]
    (home / "passwd").write_text("".join([*others, f"{LOGIN}:x:65534:65534::{home}:/bin/sh\n"]))
    config = home / "sshd_config"
    config.write_text(
        textwrap.dedent(f"""\
            Port {port}
            HostKey {home}/host
            AuthorizedKeysFile {home}/client.pub
            PidFile none
            StrictModes no
            UsePAM no
            PasswordAuthentication no
            KbdInteractiveAuthentication no
            Subsystem sftp internal-sftp
            """)
    )
    with_users = f'mount --bind {home}/passwd /etc/passwd && exec "$@"'
    serve = (*ORDINARY, shutil.which("sshd", path=search_path()) or "sshd", "-D", "-e", "-f", config)
    process = host.spawn("unshare", "--mount", "sh", "-c", with_users, "sh", *serve, name="sshd")
    _wait_until_listening(process, host, port)
    return process, home / "client"


def certificate(host: Host, path: Path) -> Path:
    """A certificate for app.example that has signed itself: `path`.crt, and `path`.key."""
    crt, key = path.with_suffix(".crt"), path.with_suffix(".key")
    host.run(
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"),
        *("-subj", "/CN=app.example", "-addext", "subjectAltName=DNS:app.example", "-out", crt, "-keyout", key),
    )
    key.chmod(0o600)
    return crt
