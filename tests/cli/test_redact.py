"""Nothing of a host's own is left in what was redacted, and the same thing has one pseudonym everywhere."""

import ipaddress
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet_cli.redact import Redactor, without_keys

USUAL = ("default", "other", "unknown", "localhost", "service")

DOCUMENT = {
    "node": "vm1.corp.example",
    "items": [
        {
            "service": "shop/api:8080",
            "state": "open",
            "endpoint": "10.9.0.3:8080",
            "source": {"identity": "spiffe://corp.example/ns/shop/sa/web", "address": "[fd00::7]:41000"},
            "policy": "shop/only-web",
            "trace": ["web calls api at 10.9.0.3:8080, which vm1.corp.example let in by only-web"],
        }
    ],
}


def test_documents_and_log_lines_share_pseudonyms() -> None:
    redactor = Redactor(["vm1.corp.example"])
    redactor.learn(DOCUMENT)
    told = redactor.value(DOCUMENT)
    item = told["items"][0]
    assert told["node"] == "host-1"
    assert item == {
        "service": "namespace-1/service-1:8080",
        "state": "open",
        "endpoint": "198.18.0.1:8080",
        "source": {"identity": "spiffe://domain-1/ns/namespace-1/sa/account-1", "address": "[100::1]:41000"},
        "policy": "namespace-1/policy-1",
        "trace": ["account-1 calls service-1 at 198.18.0.1:8080, which host-1 let in by policy-1"],
    }
    assert redactor.text("vm1: fd00::7 in api.shop") == "host-1: 100::1 in service-1.namespace-1"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("from 10.0.0.1.", "from 198.18.0.1."),
        ("10.0.0.0/8,10.0.0.0", "198.18.0.1/8,198.18.0.1"),
        ("peer:fd00::1:", "peer:100::1:"),
        ("[fd00:0::1]:80 FD00::1", "[100::1]:80 100::1"),
        ("::ffff:10.0.0.1", "::ffff:198.18.0.1"),
        ("fe80::1%eth0", "100::1%eth0"),
        ("2026-01-02T03:04:05.678Z", "2026-01-02T03:04:05.678Z"),
        ("127.0.0.1 ::1 0.0.0.0 :: 127.0.0.53:53", "127.0.0.1 ::1 0.0.0.0 :: 127.0.0.53:53"),
        ("192.0.2.3:15123 is a canary", "192.0.2.3:15123 is a canary"),
        ("1.2.3", "1.2.3"),
        ("999.1.1.1", "999.1.1.1"),
    ],
)
def test_addresses_in_any_text(text: str, told: str) -> None:
    assert Redactor().text(text) == told


def test_a_name_is_a_whole_word_and_words_of_meshnet_s_own_stay() -> None:
    redactor = Redactor()
    redactor.learn([{"service": "open:80"}, {"service": "default/db:5432"}, {"dnsName": "db.corp.example"}])
    assert redactor.text("no address of db.corp.example:5432") == "no address of dns-name-1:5432"
    assert redactor.text("open-file reopen db_1 db default") == "open-file reopen db_1 service-2 default"
    told = redactor.value({"state": "open", "message": "open", "match": "ip daddr 10.1.2.0/24 tcp open"})
    assert told == {"state": "open", "message": "service-1", "match": "ip daddr 198.18.0.1/24 tcp open"}


def is_somebodys(host: str) -> bool:
    address = ipaddress.ip_address(host)
    return not (address.is_loopback or address.is_unspecified or host.startswith(("198.18.", "100::", "192.0.2.")))


hosts = st.ip_addresses().map(str).filter(is_somebodys)
words = st.text("abcdefghijklmnopqrstuvwxyz", min_size=5, max_size=9).filter(lambda word: word not in USUAL)


@given(st.lists(hosts, min_size=1, max_size=5), st.lists(words, min_size=1, max_size=5), st.sampled_from("\n ,;=()'\""))
def test_nothing_learned_is_left(addresses: list[str], names: list[str], between: str) -> None:
    redactor = Redactor()
    redactor.learn([{"service": name} for name in names])
    told = redactor.text(between.join([*addresses, *names, *(f"[{host}]:80" for host in addresses)]))
    left = set(told.replace("[", "").replace("]:80", "").split(between))
    assert not left & {*addresses, *names}


def test_private_keys_are_taken_out_whatever_else_is_asked() -> None:
    key = "-----BEGIN EC PRIVATE KEY-----\nc2VjcmV0\n-----END EC PRIVATE KEY-----"
    certificate = "-----BEGIN CERTIFICATE-----\ncHVibGlj\n-----END CERTIFICATE-----"
    told = without_keys(f"a {key} b {certificate} -----BEGIN PRIVATE KEY-----\nc2VjcmV0")
    assert "c2VjcmV0" not in told
    assert told == (f"a (a private key was removed here) b {certificate} (a private key was removed here)")
    assert "c2VjcmV0" not in without_keys(json.dumps({"log": key}))
