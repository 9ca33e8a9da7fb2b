import pytest

from meshnet.codec.hosts import hosts_of

HOSTS = """\
127.0.0.1\tlocalhost
10.0.0.1  db.example.com db # the first
10.0.0.2  DB.example.com
::ffff:10.0.0.1 db.example.com
fd00::1   db.example.com
nonsense  db.example.com
10.0.0.3
# 10.0.0.4 db.example.com

"""


@pytest.mark.parametrize(
    ("name", "hosts"),
    [
        ("db.example.com", ("10.0.0.1", "10.0.0.2", "fd00::1")),
        ("db.example.com.", ("10.0.0.1", "10.0.0.2", "fd00::1")),
        ("db", ("10.0.0.1",)),
        ("localhost", ("127.0.0.1",)),
        ("example.com", ()),
        ("the", ()),
        ("10.0.0.3", ()),
    ],
)
def test_a_name_has_the_addresses_of_all_its_lines(name: str, hosts: tuple[str, ...]) -> None:
    assert hosts_of(HOSTS, name) == hosts
