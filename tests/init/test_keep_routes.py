"""The keeper and the routes by which answers in a client's name come back: its business as much as the rules."""

import select

import msgspec
import pytest

from meshnet_init.keep.news import RulesNews
from meshnet_init.routing import route
from meshnet_init.rule import Routing
from meshnet_init.verify import verify
from tests.init.kept import Kept
from tests.init.kernel import capture
from tests.init.test_verify import RUNS
from tests.world import Host, World, wait_for

pytestmark = pytest.mark.netns


def routing(host: Host) -> list[str]:
    return [
        host.run("ip", *family, *what, check=False).stdout
        for family in ((), ("-6",))
        for what in (("rule",), ("route", "show", "table", "6700"))
    ]


@pytest.mark.parametrize("gone", ["rule del", "-6 rule del", "route flush", "-6 route flush"])
def test_what_another_program_takes_out_is_back_long_before_the_next_look(by_nft: Kept, gone: str) -> None:
    """As systemd-networkd does when it starts again, and dhcpcd, and whoever says `ip rule flush`."""
    by_nft.configure("original_source = true\n")
    by_nft.start(MESHNET_CAPTURE__PROOF_INTERVAL="1h")
    whole = routing(by_nft.host)
    assert all("6700" in rules for rules in whole[::2])
    # It lives on, for the name of who has ended is not to be had.
    batch = f"(echo {gone.removeprefix('-6 ')} table 6700; sleep 60) | ip {'-6' if '-6' in gone else '-4'} -batch -"
    by_nft.host.spawn("sh", "-c", batch, name="other")
    report = by_nft.repaired()
    assert routing(by_nft.host) == whole
    assert report.last_repair is not None
    assert report.last_repair.differences == (
        "answers in a client's name do not find back: rule 100 or table 6700 is not as planned",
    )
    assert report.last_repair.by.startswith("ip (pid ")
    wait_for(lambda: by_nft.now().in_place, what="rules in place")
    # Of what it has done itself it has not heard: this is news, and nothing is amiss.
    looked = by_nft.now().looked_at
    by_nft.host.run("nft", "add", "table", "inet", "others")
    wait_for(lambda: by_nft.now().looked_at > looked)
    assert by_nft.now().repairs == 1


def test_others_routes_wake_nobody(world: World) -> None:
    host = world.host("app")
    with host.entered(), RulesNews() as news:

        def is_news() -> bool:
            return bool(select.select([news], [], [], 0)[0])

        for line in (
            "rule add fwmark 1 table 6701",
            "route add 10.9.9.0/24 dev eth0",
            "route add default dev eth0 table 6",
        ):
            host.run("ip", *line.split())
            host.run("ip", "-6", *line.replace("10.9.9.0/24", "fd99::/64").split())
        assert not is_news()
        assert route(Routing(mark=0x2000, accepts=False))
        assert is_news()
        news.read()
        assert not is_news()
        assert route(None)
        assert is_news()


def test_a_host_that_only_lost_its_routes_is_mended_by_up(by_nft: Kept) -> None:
    """The sidecar has to be started again only where it runs by other settings."""
    by_nft.lab.install(original_source=True)
    sidecar = msgspec.structs.replace(RUNS, original_source=True)
    with by_nft.host.entered():
        by_nft.host.run("ip", "rule", "del", "table", "6700")
        result = verify(capture(original_source=True), sidecar)
    assert (result.sidecar, result.fix) == ("differs", "sudo meshnet up")
