"""A kill is of all workers: each ends its own."""

import pytest

from tests.proxy.conftest import Hosts
from tests.proxy.programs import Records, ended_by_rst, listen, reason
from tests.proxy.workers.pairs import on_every_worker

pytestmark = pytest.mark.netns


def test_connections_of_every_worker_are_killed_together(hosts: Hosts) -> None:
    out = Records(hosts.sidecar(hosts.web))
    with listen(hosts.api, 8080) as server, on_every_worker(hosts, server) as pairs:
        said = hosts.sidecar(hosts.web).meshnet("conns", "--dir", "out", "--to", "api", "--kill", "--yes")
        assert f"{len(pairs)} connections reset\n" in said
        for pair in pairs:
            assert ended_by_rst(pair.client)
            assert ended_by_rst(pair.app)
    assert {reason(each) for each in out.ended(len(pairs))} == {"admin.killed by admin in data"}
