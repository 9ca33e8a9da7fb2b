"""What an operator names in a command: an address and port, or a service with its port."""

from meshnet.model.address import Address, parse_address
from meshnet.model.service import ServicePort
from meshnet.model.snapshot import Snapshot


def named(target: str, snapshot: Snapshot) -> tuple[Address | None, ServicePort | None]:
    """The address; of a service that was named, one of its own if it has any. Nothing: it is neither."""
    try:
        return parse_address(target), None
    except ValueError:
        pass
    service = next((service for service in snapshot.services if service.name == target), None)
    return next((address for address, found in snapshot.by_address.items() if found is service), None), service


def what_can_be_named(target: str, snapshot: Snapshot) -> str:
    """For who has named nothing that there is: the port that was left out, if that is all."""
    begun = [service.name for service in snapshot.services if service.name.rpartition(":")[0] == target]
    begun += [str(address) for address in snapshot.by_address if address.host == target.strip("[]")]
    if begun:
        return f"name its port too: {' or '.join(sorted(begun)[:3])}"
    return "meshnet endpoints lists services; an address goes too, as in 10.0.0.1:80"
