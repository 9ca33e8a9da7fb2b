"""HAProxy as a sidecar: `mode tcp`, a thread for each worker."""

from meshnet_cli.demo.world import Process
from tests.bench.subjects.hops import BOTH, BUNDLE, Hop

# `splice-auto` alone leaves most bytes to recv and send (seen with strace); the two together cost less.
_SPLICE = """option splice-request
    option splice-response"""


def start(hop: Hop, workers: int, *, splice: bool = False) -> Process:
    directory = hop.host.directory
    # Both ends show a certificate and verify the other's. Sessions may resume, as is HAProxy's default.
    tls = (
        f"ssl verify required crt {directory / BOTH} ca-file {directory / BUNDLE} ssl-min-ver TLSv1.3 "
        "ciphersuites TLS_AES_128_GCM_SHA256"
    )
    config = directory / "haproxy.cfg"
    config.write_text(
        f"""global
    nbthread {workers}
    maxconn 4000
defaults
    mode tcp
    {_SPLICE if splice else ""}
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen sidecar
    bind {":".join(map(str, hop.listen))} {tls if hop.accepts_tls else ""}
    server next {":".join(map(str, hop.to))} {tls if hop.dials_tls else ""}
"""
    )
    return hop.host.spawn("haproxy", "-db", "-f", config)
