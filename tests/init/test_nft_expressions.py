"""Rules as nf_tables expressions, where the kernel that runs the tests may not take them."""

import pytest
from pyroute2.netlink.nfnetlink.nftsocket import nft_rule_msg

from meshnet_init.backends.nft_expressions import decode, encode
from meshnet_init.rule import Rule

# What nft 1.0.6 sends for `queue flags bypass to 15101` (nft --debug=mnl).
QUEUE = bytes.fromhex("06000100 3afd0000 06000200 00010000 06000300 00010000".replace(" ", ""))


def encoded(rule: Rule) -> bytes:
    message = nft_rule_msg()
    message["attrs"] = [("NFTA_RULE_CHAIN", rule.chain), ("NFTA_RULE_EXPRESSIONS", encode(rule))]
    message.encode()
    return bytes(message.data)


def test_a_queue_is_written_as_nft_writes_it() -> None:
    assert encoded(Rule(chain="MESHNET_HOLD", queue=15101)).endswith(QUEUE)


@pytest.mark.parametrize(
    "rule",
    [
        Rule(chain="MESHNET_HOLD", queue=15101),
        Rule(chain="MESHNET_HOLD", family="ipv6", destination="fd00::/8", queue=1),
        Rule(chain="MESHNET_GUARD_OUT", mark=0x1002, verdict="unreachable"),
    ],
)
def test_what_is_written_is_read_back(rule: Rule) -> None:
    message = nft_rule_msg(encoded(rule))
    message.decode()
    counted = decode(rule.chain, message.get_attr("NFTA_RULE_EXPRESSIONS"))
    assert counted is not None
    assert counted.rule == rule


def test_a_queue_that_nobody_passes_is_not_ours() -> None:
    data = encoded(Rule(chain="MESHNET_HOLD", queue=15101)).replace(QUEUE, QUEUE[:-4] + bytes(4))
    message = nft_rule_msg(data)
    message.decode()
    assert decode("MESHNET_HOLD", message.get_attr("NFTA_RULE_EXPRESSIONS")) is None
