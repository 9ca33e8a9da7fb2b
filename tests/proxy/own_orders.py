"""Standing orders in the test's own hands, in a state of its own."""

from functools import partial

from meshnet.model.address import Address
from meshnet.model.connection import Direction
from meshnet.proxy.attempt import standing_request
from meshnet.proxy.standing_order import Asking
from meshnet.proxy.state import ProxyState
from meshnet.relay import Target

_CLIENT = Address("10.9.9.9", 40000)


def order_all(state: ProxyState) -> None:
    """One order for each service, as far as there may be so many: through tunnels to its first endpoint."""
    for port in state.snapshot.services:
        if not port.endpoints:
            continue
        endpoint = port.endpoints[0]
        record = state.registry.life(Direction.OUTBOUND, _CLIENT, None)
        record.original, record.service = endpoint.address, port.name
        opening = partial(standing_request, endpoint, port, _CLIENT.host, 2.0)
        state.orders.offer(
            record,
            Target(endpoint.address, 0, False, 2.0),
            state.orders.generation,
            state.service(port),
            state.endpoint(endpoint, port),
            Asking((endpoint.tunnel_address, endpoint.identity), opening),
        )
