"""Active checks of very many endpoints, in a state of its own, and by workers; tests/traffic has all else."""

import gc
import time
from collections.abc import Iterator

import pytest
import trio

from meshnet.codec.mesh import read_mesh
from meshnet.model.admin import EndpointView
from meshnet.model.resource import API_VERSION, CheckSpec, Metadata, TrafficPolicy, TrafficPolicySpec
from meshnet.net import sockets
from tests.proxy.metrics import value
from tests.proxy.programs import ask, echo
from tests.proxy.test_state import a_state
from tests.world import Mesh, Sidecar, World, eventually, into_the_mesh, wait_for

MANY = 10_000
VIP, PORT = "10.96.0.60", 6001


class LongestStep(trio.abc.Instrument):
    """Processor time, so that other programs of the machine do not count."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = time.thread_time()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._began = time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.seconds = max(self.seconds, time.thread_time() - self._began)


def many(port: int) -> str:
    hosts = (f"127.1.{number >> 8}.{number & 255}" for number in range(MANY))
    return (
        f"apiVersion: meshnet.dev/v1\nkind: Service\nmetadata: {{name: many}}\nspec:\n  ports: [{{port: {port}}}]\n"
        "  endpoints:\n" + "".join(f"  - address: {host}\n" for host in hosts) + "---\napiVersion: meshnet.dev/v1\n"
        "kind: TrafficPolicy\nmetadata: {name: many}\nspec: {services: [many], check: {interval: 4s, fall: 1}}\n"
    )


@pytest.fixture
def collected_as_in_a_sidecar() -> Iterator[None]:
    """See Sidecar.serve: what is alive before is not looked at again with each full collection."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()


@pytest.mark.usefixtures("collected_as_in_a_sidecar")
async def test_ten_thousand_endpoints_are_checked_without_a_stall() -> None:
    listener = sockets.listen("0.0.0.0", 0)
    assert listener is not None
    snapshot = read_mesh([("mesh.yaml", many(listener.getsockname()[1]))], 2)
    (service,) = snapshot.services
    async with a_state(read_mesh([], 1)) as state, trio.open_nursery() as nursery:
        nursery.start_soon(sockets.accept_forever, listener, lambda sock, peer: sock.close())
        longest = LongestStep()
        trio.lowlevel.add_instrument(longest)
        nursery.start_soon(state.checks.run)
        await state.apply(snapshot)
        view, counts = state.checks.view, state.checks.counts
        await eventually(
            lambda: counts["passed"] >= MANY and all(view(service, each)[0] == "passing" for each in service.endpoints),
            timeout=60,
        )
        assert counts["failed"] == 0
        await state.apply(read_mesh([], 3))
        trio.lowlevel.remove_instrument(longest)
        nursery.cancel_scope.cancel()
    assert longest.seconds < 0.05


@pytest.mark.netns
def test_each_worker_checks_by_itself_and_they_show_one_list(mesh: Mesh, world: World) -> None:
    web, up, down = (world.host(name) for name in ("web", "up", "down"))
    policy = TrafficPolicySpec(services=("api",), check=CheckSpec(interval="100ms", fall=1))
    mesh.write(
        mesh.service("api", [PORT], [up, down], addresses=[VIP], meshed=False),
        TrafficPolicy(api_version=API_VERSION, metadata=Metadata(name="checks"), spec=policy),
    )
    into_the_mesh(mesh, [web], proxy={"workers": 2})
    with echo(up, PORT):
        views = wait_for(lambda: checked(mesh.sidecars["web"], "passing", "failing"), what="one of them fails")
        assert [view.workers for view in views] == [2, 2]
        assert all(ask(web, VIP, PORT) == b"question" for _ in range(8))
    assert value(web, "meshnet_checks_total", result="failed") >= 2
    wait_for(lambda: checked(mesh.sidecars["web"], "panic", "panic"), what="both fail")
    assert value(web, "meshnet_check_panic") == 1


def checked(sidecar: Sidecar, *checks: str) -> list[EndpointView]:
    views = list(sidecar.endpoints().items)
    return views if [view.check for view in views] == list(checks) else []
