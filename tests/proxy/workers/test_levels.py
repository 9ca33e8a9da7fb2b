"""A log level is that of every worker, also of one that is started later."""

import os
import signal

import pytest

from meshnet.model.admin import LogLevelList, SetLogLevel
from meshnet_cli.client import ask
from tests.proxy.conftest import Hosts
from tests.proxy.workers.pairs import row
from tests.world import wait_for

pytestmark = pytest.mark.netns


def test_all_workers_have_it_also_those_that_come_later(hosts: Hosts) -> None:
    sidecar = hosts.sidecar(hosts.web)
    told = sidecar.meshnet("log", "level", "tunnel=debug", "--for", "10m")
    assert "tunnel     debug  9m59s" in told or "tunnel     debug  10m" in told

    def said(worker: int, level: str) -> int:
        return hosts.log(hosts.web).count(f"worker {worker}: log level of tunnel: {level}\n")

    wait_for(lambda: said(1, "debug") == said(2, "debug") == 1)
    os.kill(row(sidecar, 1).pid, signal.SIGKILL)
    wait_for(lambda: said(1, "debug") == 2, what="the next worker 1 hears of it")
    assert said(2, "debug") == 1
    answer = ask(sidecar.settings.admin.socket, SetLogLevel(subsystem="tunnel"), LogLevelList)
    assert not any(item.is_set for item in answer.items)
    wait_for(lambda: said(1, "as before") == said(2, "as before") == 1)
    wait_for(lambda: row(sidecar, 1).ready)
