"""The probe relay: what a kubelet asks at port 15121 is answered as the application would have answered the kubelet."""

import http.client
import socket
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshnet.codec.probes import write_checks
from meshnet.model.probe import Check, GrpcCheck, HttpCheck, TcpCheck
from meshnet.model.resource import API_VERSION, MeshConfig, MeshConfigSpec, Metadata
from meshnet.model.service import Mode
from tests.proxy.programs import accept, is_reset, listen, reset
from tests.traffic.servers import certificate, start
from tests.world import Host, Mesh, World, into_the_mesh, still_alive

pytestmark = pytest.mark.netns

RELAY, HTTP, HTTPS, GRPC, LOCAL, GONE = 15121, 8080, 8443, 9000, 8081, 8082
LOOKED_AT = "kube-probe/1.34"


def http_check(path: str, **more: object) -> HttpCheck:
    return HttpCheck(port=HTTP, path=path, **more)  # type: ignore[arg-type]  # as the test says


CHECKS: dict[str, Check] = {
    "ok/livez": http_check("/ok"),
    "fail/livez": http_check("/fail"),
    "said/livez": http_check("/said?a=b", headers=(("Host", "shop.example"), ("X-Token", "t0"))),
    "own/livez": http_check("/said", headers=(("User-Agent", "mine"), ("Accept", ""))),
    "empty/livez": http_check("/empty"),
    "unchanged/livez": http_check("/unchanged"),
    "inside/livez": http_check("/inside"),
    "outside/livez": http_check("/outside"),
    "loop/livez": http_check("/loop"),
    "tls/livez": HttpCheck(port=HTTPS, path="/ok", scheme="HTTPS"),
    "tls-for-plain/livez": http_check("/ok", scheme="HTTPS"),
    "plain-for-tls/livez": HttpCheck(port=HTTPS, path="/ok"),
    "big/livez": http_check("/big"),
    "tcp/readyz": TcpCheck(port=HTTP),
    "gone/readyz": TcpCheck(port=GONE),
    "gone/livez": HttpCheck(port=GONE),
    "local/readyz": TcpCheck(port=LOCAL),
    "grpc/livez": GrpcCheck(port=GRPC),
    "sick/livez": GrpcCheck(port=GRPC, service="sick"),
    "unknown/livez": GrpcCheck(port=GRPC, service="no.such.Service" * 20),
    "http-for-grpc/livez": GrpcCheck(port=HTTP),
    "gone/startupz": GrpcCheck(port=GONE),
}


class Pod:
    """`pod` is in the mesh, and its rules capture all; `node` is where the kubelet would be."""

    def __init__(self, world: World) -> None:
        self.pod, self.node = world.host("pod"), world.host("node")
        self.mesh = Mesh(world)
        strict = MeshConfigSpec(mode=Mode.STRICT)
        self.mesh.write(MeshConfig(api_version=API_VERSION, metadata=Metadata(name="mesh"), spec=strict))
        into_the_mesh(self.mesh, [self.pod], probes={"checks": write_checks(CHECKS)}, proxy={"workers": 2})
        nginx(self.pod)
        start(self.pod, GRPC, sys.executable, Path(__file__).with_name("grpc_app.py"), str(GRPC))

    def ask(self, name: str, address: str = "", **headers: str) -> tuple[int, str]:
        """What the kubelet gets: status and body."""
        address = address or self.pod.address
        connection = http.client.HTTPConnection(address, RELAY)
        connection.sock = self.node.connect(address, RELAY)
        try:
            connection.request("GET", f"/{name}", headers={"User-Agent": LOOKED_AT, "Connection": "close"} | headers)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()


def nginx(host: Host) -> None:
    home = host.directory / "nginx"
    home.mkdir()
    certificate(host, home / "server")
    (home / "big").write_bytes(b"x" * 50_000)
    (home / "nginx.conf").write_text(
        textwrap.dedent(f"""\
            daemon off;
            error_log stderr;
            pid {home}/pid;
            events {{}}
            http {{
              access_log off;
              client_body_temp_path {home}/b; proxy_temp_path {home}/p; fastcgi_temp_path {home}/f;
              uwsgi_temp_path {home}/u; scgi_temp_path {home}/s;
              server {{
                listen {HTTP}; listen [::]:{HTTP};
                listen 127.0.0.1:{LOCAL};
                listen {HTTPS} ssl;
                ssl_certificate {home}/server.crt;
                ssl_certificate_key {home}/server.key;
                absolute_redirect off;
                root {home};
                location = /ok {{ return 200 "fine"; }}
                location = /fail {{ return 500 "broken"; }}
                location = /said {{ return 200 "$http_host|$http_user_agent|$http_accept|$http_x_token|$args"; }}
                location = /empty {{ return 204; }}
                location = /unchanged {{ return 304; }}
                location = /inside {{ return 302 /ok; }}
                location = /outside {{ return 302 http://elsewhere.example/ok; }}
                location = /loop {{ return 302 /loop; }}
              }}
            }}
            """)
    )
    start(host, HTTP, "nginx", "-e", "stderr", "-c", home / "nginx.conf")


@pytest.fixture(scope="module")
def _pod() -> Iterator[Pod]:
    with World() as world:
        yield Pod(world)


@pytest.fixture
def pod(_pod: Pod, request: pytest.FixtureRequest) -> Iterator[Pod]:
    yield _pod
    still_alive(_pod.mesh, request)


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("ok/livez", 200, "fine"),
        ("fail/livez", 500, "broken"),
        ("said/livez", 200, f"shop.example|{LOOKED_AT}|*/*|t0|a=b"),
        ("empty/livez", 204, ""),
        ("unchanged/livez", 304, ""),
        ("inside/livez", 200, "fine"),
        ("outside/livez", 302, "302 Found"),
        ("loop/livez", 503, "more than 10 redirects"),
        ("tls/livez", 200, "fine"),
        ("tls-for-plain/livez", 503, ""),
        ("plain-for-tls/livez", 400, "plain HTTP request was sent to HTTPS port"),
        ("big/livez", 200, "x" * (10 << 10)),
        ("tcp/readyz", 200, "ok"),
        ("gone/readyz", 503, "Connection refused"),
        ("gone/livez", 503, "Connection refused"),
        ("local/readyz", 503, "Connection refused"),
        ("grpc/livez", 200, "ok"),
        ("sick/livez", 503, "the health service says 2, not SERVING"),
        ("unknown/livez", 503, "the health service answers with 5"),
        ("http-for-grpc/livez", 503, ""),
        ("gone/startupz", 503, "Connection refused"),
        ("ok/readyz", 404, "no such probe"),
        ("", 404, "no such probe"),
    ],
)
def test_the_application_s_own_answer_is_relayed(pod: Pod, name: str, status: int, said: str) -> None:
    found, body = pod.ask(name)
    assert (found, said in body) == (status, True), body
    assert len(body) <= 10 << 10


def test_headers_of_the_probe_beat_those_of_a_kubelet(pod: Pod) -> None:
    assert pod.ask("own/livez") == (200, f"{pod.pod.address}:{HTTP}|mine|||")


def test_the_application_is_asked_at_the_address_at_which_the_relay_was(pod: Pod) -> None:
    assert pod.ask("own/livez", pod.pod.address6) == (200, f"[{pod.pod.address6}]:{HTTP}|mine|||")


def test_trap_19_a_redirected_probe_is_accepted_by_the_sidecar_and_the_relay_asks_the_application(pod: Pod) -> None:
    # In plain text to a strict port: accepted, which a TCP probe takes for success although nobody listens, then reset.
    assert is_reset(pod.node, pod.pod.address, GONE)
    assert is_reset(pod.node, pod.pod.address, HTTP, b"GET /ok HTTP/1.0\r\n\r\n")
    assert pod.ask("ok/livez")[0] == 200
    assert pod.ask("gone/readyz")[0] == 503
    with listen(pod.pod, GONE):
        assert pod.ask("gone/readyz")[0] == 200


@pytest.mark.parametrize("name", ["gone/livez", "gone/startupz"])
def test_an_application_that_accepts_and_says_nothing_is_given_its_time_and_no_more(pod: Pod, name: str) -> None:
    with listen(pod.pod, GONE) as server:
        assert pod.ask(name) == (504, "no answer within 1 s\n")
        accept(server).close()


@pytest.mark.parametrize("said", [b"", b"\0" * 100, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab"])
@pytest.mark.parametrize("name", ["gone/livez", "gone/startupz"])
def test_an_application_that_answers_nonsense_is_not_well(pod: Pod, name: str, said: bytes) -> None:
    with listen(pod.pod, GONE) as server:
        asked = pod.node.connect(pod.pod.address, RELAY)
        with asked:
            asked.sendall(f"GET /{name} HTTP/1.1\r\nHost: pod\r\n\r\n".encode())
            app = accept(server)
            app.sendall(said)
            app.close()
            assert asked.recv(12) == b"HTTP/1.1 503"


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (b"GET /ok/livez HTTP/1.0\r\n\r\n", b"HTTP/1.1 200"),
        (b"HEAD /ok/livez HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n\r\n", b"HTTP/1.1 200"),
        (b"POST /ok/livez HTTP/1.1\r\nHost: pod\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx", b"HTTP/1.1 405"),
        (b"GET http://10.0.0.1/ok/livez HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n\r\n", b"HTTP/1.1 404"),
        (b"GET /../ok/livez HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n\r\n", b"HTTP/1.1 404"),
        (b"\x16\x03\x01\x02\x00\x01\x00\n\n", b""),
        (b"A" * 100_000, b""),
    ],
    ids=["1.0", "head", "post", "absolute", "dots", "tls", "long"],
)
def test_it_outlives_every_kind_of_request(pod: Pod, sent: bytes, answered: bytes) -> None:
    with pod.node.connect(pod.pod.address, RELAY) as client:
        try:
            client.sendall(sent)
            said = b"".join(iter(lambda: client.recv(65536), b""))
        except ConnectionError:
            said = b""
    assert said[:12] == answered
    assert pod.ask("ok/livez")[0] == 200


def test_who_holds_all_its_connections_holds_them_for_a_moment(pod: Pod) -> None:
    held: list[socket.socket] = [pod.node.connect(pod.pod.address, RELAY) for _ in range(128)]
    with pod.node.connect(pod.pod.address, RELAY) as refused:
        assert refused.recv(1) == b""
    for client in held:
        assert client.recv(1) == b""  # silent for too long
        client.close()
    assert pod.ask("ok/livez")[0] == 200


def test_clients_that_reset_at_once_do_no_harm(pod: Pod) -> None:
    for _ in range(20):
        client = pod.node.connect(pod.pod.address, RELAY)
        client.sendall(b"GET /ok/livez HTTP/1.1\r\nHost: pod\r\n\r\n")
        reset(client)
    assert pod.ask("ok/livez")[0] == 200
    process = pod.mesh.sidecars["pod"].process
    assert process is not None
    assert "Traceback" not in process.output
