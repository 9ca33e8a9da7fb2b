"""What an operator is told of a certificate that was not accepted."""

import pytest

from meshnet.errors import Reason
from meshnet.net.tls import not_verified


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (9, Reason.TLS_NOT_YET_VALID),
        (10, Reason.TLS_EXPIRED),
        (18, Reason.TLS_PEER_IDENTITY),  # self-signed
        (20, Reason.TLS_PEER_IDENTITY),  # of no issuer that we know
        (1, Reason.TLS_HANDSHAKE),  # and these are no fault of the peer: unspecified
        (17, Reason.TLS_HANDSHAKE),  # out of memory
        (66, Reason.TLS_HANDSHAKE),  # the store could not be searched
    ],
)
def test_a_peer_is_not_blamed_for_what_openssl_could_not_do(code: int, reason: Reason) -> None:
    failure = not_verified(code, "why")
    assert failure.reason is reason
    assert "why" in str(failure)
