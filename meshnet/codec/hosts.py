"""/etc/hosts, read: hosts(5)."""

from meshnet.model.address import canonical_host


def hosts_of(text: str, name: str) -> tuple[str, ...]:
    """The addresses that the file with this text gives to `name`, in its order; a line that is wrong is passed over."""
    wanted = name.lower().rstrip(".")
    found: dict[str, None] = {}
    for line in text.splitlines():
        address, *names = line.partition("#")[0].split() or [""]
        if wanted in (each.lower().rstrip(".") for each in names):
            try:
                found[canonical_host(address)] = None
            except ValueError:
                pass
    return tuple(found)
