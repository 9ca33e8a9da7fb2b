"""nginx as a sidecar: the stream module, a process for each worker."""

from pathlib import Path

from meshnet_cli.demo.world import Process
from tests.bench.subjects.hops import BUNDLE, CHAIN, KEY, Hop

_MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")  # Debian's libnginx-mod-stream; elsewhere it is built in
_SUITES = "Ciphersuites TLS_AES_128_GCM_SHA256"


def start(hop: Hop, workers: int) -> Process:
    config = hop.host.directory / "nginx.conf"
    config.write_text(
        f"""{f"load_module {_MODULE};" if _MODULE.exists() else ""}
daemon off;
user root;
pid {hop.host.directory}/nginx.pid;
error_log stderr warn;
worker_processes {workers};
worker_rlimit_nofile 65536;
events {{ worker_connections 8192; }}
stream {{
    server {{
        listen {":".join(map(str, hop.listen))} {"ssl" if hop.accepts_tls else ""};
        proxy_pass {":".join(map(str, hop.to))};
        proxy_half_close on;
        {_accepting(hop) if hop.accepts_tls else ""}
        {_dialling(hop) if hop.dials_tls else ""}
    }}
}}
"""
    )
    # nginx's workers outlive a master that was killed; with a PID namespace of their own they do not.
    namespace = ("unshare", "--pid", "--fork", "--kill-child=KILL", "--")
    return hop.host.spawn(*namespace, "nginx", "-e", "stderr", "-c", config, name="nginx")


def _accepting(hop: Hop) -> str:
    directory = hop.host.directory
    return f"""ssl_certificate {directory / CHAIN};
        ssl_certificate_key {directory / KEY};
        ssl_client_certificate {directory / BUNDLE};
        ssl_verify_client on;
        ssl_protocols TLSv1.3;
        ssl_conf_command {_SUITES};
        ssl_session_cache shared:sessions:1m;"""


def _dialling(hop: Hop) -> str:
    directory = hop.host.directory
    return f"""proxy_ssl on;
        proxy_ssl_certificate {directory / CHAIN};
        proxy_ssl_certificate_key {directory / KEY};
        proxy_ssl_trusted_certificate {directory / BUNDLE};
        proxy_ssl_verify on;
        proxy_ssl_name {hop.peer};
        proxy_ssl_protocols TLSv1.3;
        proxy_ssl_conf_command {_SUITES};"""
