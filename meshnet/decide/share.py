"""What one of several workers may take of the limits: each counts its own connections, and together they keep them."""

from msgspec import structs

from meshnet.model.service import Limits, ServicePort
from meshnet.model.snapshot import Snapshot


def share_of(limits: Limits, workers: int) -> Limits:
    """Every number of `limits` divided by `workers`, rounded up, so that none becomes 0, which means no limit."""
    return structs.replace(
        limits,
        max_connections=_part(limits.max_connections, workers),
        max_pending=_part(limits.max_pending, workers),
        max_connections_per_endpoint=_part(limits.max_connections_per_endpoint, workers),
    )


def share_of_mesh(snapshot: Snapshot, workers: int) -> Snapshot:
    """The same mesh, with the limits that one of its `workers` keeps."""
    others: dict[int, ServicePort] = {}
    for service in snapshot.services:
        traffic = structs.replace(service.traffic, limits=share_of(service.traffic.limits, workers))
        others[id(service)] = structs.replace(service, traffic=traffic)
    return snapshot.with_ports(others)


def _part(limit: int, workers: int) -> int:
    return -(-limit // workers)
