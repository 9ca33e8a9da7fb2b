"""Real programs, unmodified, on both ends; none of them knows of the mesh."""

import hashlib
import json
import os
import signal
from collections.abc import Iterator

import pytest

from meshnet.model.connection import Security
from tests.proxy.programs import Records, reason
from tests.traffic import servers
from tests.traffic.calls import Call
from tests.traffic.conftest import Hosts, Name
from tests.world import Host

pytestmark = pytest.mark.netns

CONTENT = os.urandom(10_000_000)


class Both:
    """What both sidecars record of connections that end well."""

    def __init__(self, hosts: Hosts, api: Host) -> None:
        self._out, self._into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(api))

    def tell(self, count: int, *, sent: int = 1, received: int = 1) -> None:
        there = {record.id: record for record in self._out.ended(count)}
        here = {record.id: record for record in self._into.ended(count)}
        assert there.keys() == here.keys()
        for connection_id, record in there.items():
            twin = here[connection_id]
            assert record.tls.mode is twin.tls.mode is Security.MTLS
            assert (record.bytes_sent, record.bytes_received) == (twin.bytes_sent, twin.bytes_received)
            assert {reason(record).split()[0], reason(twin).split()[0]} == {"ok"}
        assert max(record.bytes_sent for record in there.values()) >= sent
        assert max(record.bytes_received for record in there.values()) >= received


@pytest.fixture(scope="module")
def web_site(_hosts: Hosts) -> Iterator[Name]:
    name = _hosts.new_name()
    process = servers.nginx(_hosts.apis[0], name.port, CONTENT)
    yield name
    process.terminate()


@pytest.fixture(scope="module")
def database(_hosts: Hosts) -> Iterator[Name]:
    name = _hosts.new_name()
    process = servers.postgres(_hosts.apis[0], name.port)
    yield name
    process.popen.send_signal(signal.SIGINT)
    process.popen.wait(10)


@pytest.mark.parametrize("family", ["address", "address6"])
def test_curl_gets_ten_megabytes_twice_over_one_connection_from_nginx(
    hosts: Hosts, web_site: Name, family: str
) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(web_site, [api]))
    address = getattr(web_site, family)
    url = (
        f"http://[{address}]:{web_site.port}/content" if ":" in address else f"http://{address}:{web_site.port}/content"
    )
    records = Both(hosts, api)
    files = [hosts.web.directory / name for name in ("first", "second")]
    report = hosts.web.run(
        *("curl", "-sSfg", "-w", "%{http_code} %{num_connects}\n", "-o", files[0], url, "-o", files[1], url),
    )
    assert report.stdout.splitlines() == ["200 1", "200 0"]
    digest = hashlib.sha256(CONTENT).digest()
    assert [hashlib.sha256(file.read_bytes()).digest() for file in files] == [digest, digest]
    records.tell(1, received=2 * len(CONTENT))


def test_redis_clients_talk_to_redis(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(name, [api]))
    process = servers.redis(api, name.port)
    there = ("-h", name.address, "-p", str(name.port))
    records = Both(hosts, api)
    assert hosts.web.run("redis-cli", *there, "set", "greeting", "hello").stdout == "OK\n"
    assert hosts.web.run("redis-cli", *there, "get", "greeting").stdout == "hello\n"
    records.tell(2)
    report = hosts.web.run("redis-benchmark", *there, "--csv", "-n", "2000", "-c", "10", "-P", "4", "-t", "set,get")
    assert [line.split(",")[0] for line in report.stdout.splitlines()[1:]] == ['"SET"', '"GET"']
    assert int(hosts.web.run("redis-cli", *there, "dbsize").stdout) == 2  # the greeting, and the benchmark's one key
    assert process.terminate() == 0


def test_psql_asks_postgresql(hosts: Hosts, database: Name) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(database, [api]))
    records = Both(hosts, api)
    assert psql(hosts.web, database, "disable") == "42|f\n"
    records.tell(1)


def test_psql_starts_tls_of_its_own_inside_the_tunnel(hosts: Hosts, database: Name) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(database, [api]))
    out, into = Records(hosts.sidecar(hosts.web)), Records(hosts.sidecar(api))
    assert psql(hosts.web, database, "require") == "42|t\n"
    # The server's TLS says goodbye to a client that may have left already, so a reset may fly; but nothing else may.
    for record in (out.one(), into.one()):
        assert reason(record).split()[0] in ("ok", "peer.rst")
        assert record.tls.mode is Security.MTLS
        assert min(record.bytes_sent, record.bytes_received) > 500


def test_pgbench_loses_no_transaction(hosts: Hosts, database: Name) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(database, [api]))
    there = ("-h", database.address, "-p", str(database.port), "-U", "app", "postgres")
    hosts.web.run("pgbench", "-i", "-q", "-s", "1", *there, PGSSLMODE="disable")
    records = Both(hosts, api)
    report = hosts.web.run("pgbench", "-n", "-c", "4", "-t", "50", *there, PGSSLMODE="disable").stdout
    assert "number of transactions actually processed: 200/200" in report
    records.tell(5)  # one more than clients: it asks for the scale first


@pytest.mark.parametrize("direction", [(), ("-R",)], ids=["up", "down"])
def test_iperf3_fills_the_line_in_either_direction(hosts: Hosts, name: Name, direction: tuple[str, ...]) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(name, [api]))
    servers.start(api, name.port, "iperf3", "-s", "-1", "-p", str(name.port))
    out = Records(hosts.sidecar(hosts.web))
    report = json.loads(
        hosts.web.run("iperf3", "-J", "-t", "1", "-c", name.address, "-p", str(name.port), *direction).stdout
    )
    assert "error" not in report
    moved = report["end"]["sum_received"]["bytes"]
    assert moved > 1_000_000
    control, data = sorted(out.ended(2), key=lambda record: record.bytes_sent + record.bytes_received)
    assert control.tls.mode is data.tls.mode is Security.MTLS
    assert (data.bytes_received if direction else data.bytes_sent) >= moved


def test_the_applications_own_tls_passes_as_it_is(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(name, [api]))
    crt = servers.certificate(api, api.directory / "app")
    key = crt.with_suffix(".key")
    process = servers.start(
        api, name.port, "openssl", "s_server", "-accept", str(name.port), "-cert", crt, "-key", key, "-rev"
    )
    records = Both(hosts, api)
    done = hosts.web.run(
        *("openssl", "s_client", "-connect", f"{name.address}:{name.port}", "-CAfile", crt, "-verify_return_error"),
        *("-verify_hostname", "app.example", "-brief", "-ign_eof"),
        stdin="hello\nCLOSE\n",
    )
    assert "olleh\n" in done.stdout
    assert "Peer certificate: CN=app.example" in done.stderr.replace(" = ", "=")  # OpenSSL 3.5 leaves the blanks out
    records.tell(1)
    process.kill()


def test_a_server_that_speaks_first_is_heard_by_a_client_that_says_nothing_istio10832(hosts: Hosts, name: Name) -> None:
    api = hosts.apis[0]
    hosts.write(hosts.service(name, [api]))
    records = Both(hosts, api)
    with hosts.apps(name.port, [api]), Call(hosts.web, name) as call:
        assert call.server == "api-1"
    records.tell(1, sent=0, received=len("api-1\n"))


def psql(host: Host, database: Name, sslmode: str) -> str:
    """What it prints: an answer, and whether PostgreSQL sees TLS of its own."""
    where = f"host={database.address} port={database.port} user=app dbname=postgres sslmode={sslmode}"
    question = "select 6 * 7, ssl from pg_stat_ssl where pid = pg_backend_pid()"
    return host.run("psql", "-XAt", where, "-c", question).stdout
