"""The legacy tables are read, changed and written back whole, so two who do so at once must take turns."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from meshnet_init.backends import differences
from meshnet_init.backends.iptables import IptablesBackend
from meshnet_init.backends.iptables_binaries import by_binaries
from meshnet_init.backends.python_iptables import by_python_iptables
from meshnet_init.host import host_facts
from meshnet_init.plan import make_plan
from tests.init.kernel import capture, legacy_rules
from tests.world import World, wait_for

pytestmark = pytest.mark.netns

_WRITERS: dict[str, Callable[[], IptablesBackend | None]] = {
    "python-iptables": by_python_iptables,
    "iptables-legacy-restore": lambda: by_binaries("legacy", "legacy"),
}
# Adds one rule after the other, as kube-proxy and Docker do, until it is told to end; prints the number of each.
_OTHER = """
while [ ! -e stop ]; do
    n=$((n + 1))
    iptables-legacy -w 60 -t nat -A OTHERS -p tcp --dport $n -j RETURN || exit 1
    echo "added $n"
done
"""


@pytest.mark.parametrize("by", _WRITERS)
def test_who_writes_at_the_same_time_loses_no_rule_and_neither_do_we_istio58507(
    world: World, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))  # that of this test's tables alone
    backend = _WRITERS[by]()
    assert backend is not None
    host = world.host("app")
    host.run("iptables-legacy", "-t", "nat", "-N", "OTHERS")
    other = host.spawn("sh", "-c", f"cd '{tmp_path}'\n{_OTHER}", name="other", XTABLES_LOCKFILE=str(tmp_path / "lock"))

    def added() -> int:
        return other.output.count("added ")

    with host.entered():
        plans = [make_plan(capture(outbound_ports=[port]), host_facts()) for port in ("80", "443")]
        for at in range(6):
            before = added()
            backend.apply(plans[at % 2])
            assert not differences(backend.expected(plans[at % 2]), backend.installed())
            wait_for(lambda before=before: added() > before, what="another rule of the other's")
    (tmp_path / "stop").touch()
    assert other.popen.wait(60) == 0
    found = re.findall(r"-A OTHERS -p tcp -m tcp --dport (\d+) -j RETURN", legacy_rules(host, "ip"))
    assert found == [str(number) for number in range(1, added() + 1)]
