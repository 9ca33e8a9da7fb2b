"""One worker pings, and the parent says whether rules capture."""

import pytest

from meshnet.model.admin import Ping
from meshnet.model.ping import PingResult
from meshnet_cli.client import ask
from tests.proxy.conftest import API, Hosts
from tests.proxy.programs import echo
from tests.proxy.workers.pairs import row, stopped
from tests.world import ProgramFailed, wait_for

pytestmark = pytest.mark.netns


def test_it_is_as_that_of_one_process(hosts: Hosts) -> None:
    path = hosts.sidecar(hosts.web).settings.admin.socket

    def ping() -> PingResult:
        return ask(path, Ping(target=f"{API}:8080"), PingResult)

    with echo(hosts.api, 8080):
        result = wait_for(lambda: (found := ping()).captured and found, what="capture is proved")
        assert isinstance(result, PingResult)
        (item,) = result.items
        assert (item.identity, item.verdict, item.reason) == (hosts.mesh.identity("api"), "allowed", None)
        with stopped(row(hosts.sidecar(hosts.web), 1).pid):  # then the other one does
            slow = ask(path, Ping(target=f"{API}:8080", timeout=0.5), PingResult, timeout=10)
        assert slow.items[0].reason is None
    with pytest.raises(ProgramFailed, match="no service nobody:1 here"):
        hosts.sidecar(hosts.web).meshnet("ping", "nobody:1")
