"""Whether what was decided for one connection will hold for the next ones of its kind."""

from meshnet.decide.breaker import BreakerState
from meshnet.model.service import Endpoint, ServicePort


def endpoint_for_all(service: ServicePort, pinned: Endpoint | None, breaker: BreakerState) -> Endpoint | None:
    """The one endpoint that every connection to `service` gets, as long as it does well; None if that is not so.

    With several to choose from each connection is a choice. Below a limit of its own an endpoint is counted for each.
    And while its breaker is not closed, who may try is decided each time.
    """
    if pinned is None and len(service.endpoints) != 1:
        return None
    endpoint = pinned or service.endpoints[0]
    if not endpoint.weight or breaker is not BreakerState.CLOSED:
        return None
    return None if service.traffic.limits.max_connections_per_endpoint else endpoint
