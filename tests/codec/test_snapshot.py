import pytest

from meshnet.codec.mesh import read_mesh
from meshnet.codec.snapshot import decode_snapshot, encode_snapshot
from meshnet.model.snapshot import Snapshot

MESH = """\
apiVersion: meshnet.dev/v1
kind: MeshConfig
metadata: {name: mesh}
spec: {trustDomain: prod, mode: strict, defaultAction: DENY}
---
apiVersion: meshnet.dev/v1
kind: Service
metadata: {name: api, namespace: shop}
spec:
  addresses: [10.96.0.10, "fd96::10"]
  ports: [{port: 80, targetPort: 8080}, {port: 443, mode: permissive}]
  endpoints: [{address: 10.1.0.1, tunnel: meshnet, identity: "spiffe://prod/sa/api", weight: 3}, {address: 10.1.0.2}]
---
apiVersion: meshnet.dev/v1
kind: Service
metadata: {name: twin}
spec: {ports: [{port: 8080}], endpoints: [{address: 10.1.0.1}]}
---
apiVersion: meshnet.dev/v1
kind: TrafficPolicy
metadata: {name: calm, namespace: shop}
spec: {services: [api], balance: round_robin, limits: {maxConnections: 3}}
---
apiVersion: meshnet.dev/v1
kind: AccessPolicy
metadata: {name: only}
spec: {action: ALLOW, services: [shop/api], rules: [{from: {principals: ["spiffe://prod/sa/web"]}}, {to: {ports: [1]}}]}
"""


def many(endpoints: int) -> str:
    lines = [f"  - address: 10.2.{number >> 8}.{number & 255}\n" for number in range(endpoints)]
    head = "apiVersion: meshnet.dev/v1\nkind: Service\nmetadata: {name: many}\nspec:\n"
    return f"{head}  ports: [{{port: 80}}, {{port: 81}}]\n  endpoints:\n" + "".join(lines)


@pytest.mark.parametrize("text", ["", MESH, many(1), many(256), many(257), many(1000), MESH + "---\n" + many(600)])
def test_what_was_written_is_read_again(text: str) -> None:
    snapshot = read_mesh([("mesh.yaml", text)], 7)
    lines = list(encode_snapshot(snapshot))
    again = decode_snapshot(lines, 7)
    assert again == snapshot
    assert list(again.by_endpoint) == list(snapshot.by_endpoint)
    assert list(encode_snapshot(again)) == lines


def test_an_endpoint_is_the_same_object_wherever_it_is_found() -> None:
    snapshot = decode_snapshot(encode_snapshot(read_mesh([("mesh.yaml", MESH + "---\n" + many(600))], 1)), 1)
    for service, endpoint in snapshot.by_endpoint.values():
        assert any(endpoint is each for each in service.endpoints)
        assert any(service is each for each in snapshot.services)


def test_no_line_is_long() -> None:
    snapshot = read_mesh([("mesh.yaml", many(5000))], 1)
    assert max(map(len, encode_snapshot(snapshot))) < 64 << 10


LINES = list(encode_snapshot(read_mesh([("mesh.yaml", MESH + "---\n" + many(600))], 1)))

MORE = next(line for line in LINES if line.startswith(b'{"type":"endpoints"'))


@pytest.mark.parametrize(
    "lines", [[], LINES[1:], LINES[-1:], [*LINES, LINES[0]], [b"{"], [LINES[0], b"[]"], [LINES[0], MORE]]
)
def test_anything_else_is_refused(lines: list[bytes]) -> None:
    with pytest.raises(ValueError):
        decode_snapshot(lines, 1)


def test_two_that_differ_by_their_version_alone_are_written_the_same() -> None:
    assert list(encode_snapshot(Snapshot(version=1))) == list(encode_snapshot(Snapshot(version=2)))
