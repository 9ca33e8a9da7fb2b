"""What the built extension asks of the machine that it is loaded on."""

import re
from pathlib import Path

from meshnet.relay.native import _core
from tests.relay.native.builds import run

_LIBC = re.compile(r"libc\.(so|musl-\w+\.so)|ld-linux|ld-musl|libpthread\.so|libdl\.so|linux-vdso")


def test_the_built_extension_needs_libc_and_nothing_else() -> None:
    """OpenSSL is found at run time. That Python's own symbols are the limited API's the compiler sees to, by -Werror
    and Py_LIMITED_API (tests/relay/native/builds.py).
    """
    built = Path(str(_core.__file__))
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "--dynamic", "--wide", built))
    assert needed
    assert [library for library in needed if not _LIBC.match(library)] == []
    assert built.suffixes == [".abi3", ".so"]
