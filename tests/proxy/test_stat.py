"""What `meshnet stat` makes of a real sidecar's metrics."""

import json

import pytest

from meshnet.model.admin import FamilyList, GetMetrics
from meshnet_cli.client import ask
from meshnet_cli.rates import stat
from tests.proxy.conftest import API, Hosts
from tests.proxy.programs import Records, accept, converse, is_reset, listen
from tests.world import ProgramFailed

pytestmark = pytest.mark.netns


def test_what_happened_between_two_looks(hosts: Hosts) -> None:
    path, out = hosts.sidecar(hosts.web).settings.admin.socket, Records(hosts.sidecar(hosts.web))
    before = ask(path, GetMetrics(), FamilyList).items
    with listen(hosts.api, 8080) as server:
        for _ in range(3):
            converse(hosts.web.connect(API, 8080), accept(server), up=b"12345", down=b"123")
    assert is_reset(hosts.web, API, 8080)
    out.ended(4)
    told = stat(before, ask(path, GetMetrics(), FamilyList).items, 2.0)
    of_api = [it for it in told.items if it.service == "api:8080"]
    (one,) = of_api
    assert (one.direction, one.opened_per_second, one.failed_per_second) == ("outbound", 2.0, 0.5)
    assert one.failed_per_second_by_reason == {"connect.refused": 0.5}
    assert (one.sent_per_second, one.received_per_second) == (7.5, 4.5)
    assert one.connect is not None
    assert one.duration is not None
    assert (one.connect.within, one.connect.connections, one.duration.connections) == ("interval", 3, 4)
    assert 0 < one.connect.p50_ms <= one.connect.p99_ms
    assert told.connect is not None
    assert (told.connect.within, told.connect.connections) == ("interval", 3)
    said = json.loads(hosts.sidecar(hosts.web).meshnet("stat", "api", "--interval", "50ms", "-o", "json"))
    assert (said["items"][0]["opened"], said["items"][0]["failed"]) == (one.opened, one.failed)


@pytest.mark.parametrize("command", ["stat", "top"])
def test_a_service_that_there_is_not_is_told_and_one_that_nobody_called_is_shown(hosts: Hosts, command: str) -> None:
    web, few = hosts.sidecar(hosts.web), ["--count", "1"] if command == "top" else []
    with pytest.raises(ProgramFailed, match="no service 'nosuch'"):
        web.meshnet(command, "nosuch", *few)
    assert "SERVICE" in web.meshnet(command, "api", *few, "--interval", "20ms")
