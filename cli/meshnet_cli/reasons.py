"""What each reason code means and what to do about it, in words. `meshnet explain` prints them."""

from collections.abc import Mapping
from typing import NamedTuple

from meshnet.errors import Reason


class Advice(NamedTuple):
    """In `cure`, SERVICE and ID stand for the connection's own."""

    cause: str
    cure: str


ADVICE: Mapping[Reason, Advice] = {
    Reason.OK: Advice(
        "both sides sent what they had to send and finished",
        "nothing",
    ),
    Reason.NO_ENDPOINT: Advice(
        "the service has no endpoint that could be tried: none is known, or every one failed or is ejected",
        "meshnet endpoints SERVICE shows which, and each one's last error; add endpoints to the Service, or mend those",
    ),
    Reason.CONNECT_REFUSED: Advice(
        "the endpoint's host answered that nothing listens on that port",
        "on that host: ss -ltn shows what listens. Start the application, or correct the port in the Service; if it is "
        "the port of tunnels (15108), the sidecar there is down: meshnet status",
    ),
    Reason.CONNECT_TIMEOUT: Advice(
        "the endpoint's host did not answer: it is down, overloaded, or a firewall drops the packets",
        "try it from this host: nc -vz ADDRESS PORT; a far network may need a higher connect.attemptTimeout",
    ),
    Reason.CONNECT_UNREACHABLE: Advice(
        "this host has no route to the endpoint, or a router or firewall on the way says so",
        "ip route get ADDRESS; then correct the route, or the address in the Service",
    ),
    Reason.TLS_HANDSHAKE: Advice(
        "the endpoint's port for tunnels was reached, but the TLS handshake failed",
        "on both hosts, meshnet status: do both certificates come from the same authority? is tunnelPort a sidecar's?",
    ),
    Reason.TLS_PEER_IDENTITY: Advice(
        "the other side did not prove to be who the mesh says: another identity, authority or trust domain",
        "the steps above say what was found; correct identity in the Service, or issue the right certificate there",
    ),
    Reason.TLS_EXPIRED: Advice(
        "a certificate was past its end, or a clock is ahead",
        "meshnet status on both hosts shows the end; renew it with meshnet ca, and compare the clocks: timedatectl",
    ),
    Reason.TLS_NOT_YET_VALID: Advice(
        "a certificate's time has not begun: this host's clock is behind, or that of its issuer was ahead",
        "timedatectl shows this host's clock, and whether something keeps it right; meshnet status on the other host "
        "shows when its certificate begins: if that is still to come, issue another with meshnet ca",
    ),
    Reason.TLS_NO_IDENTITY: Advice(
        "this sidecar has no certificate that its peer takes, or by its own clock none that is valid now, and never "
        "speaks plain text to a meshed endpoint instead",
        "meshnet status says what is wrong with the certificate; set the clock (timedatectl), or issue another with "
        "meshnet ca",
    ),
    Reason.TUNNEL_PROTOCOL: Advice(
        "the other sidecar broke the tunnel protocol: another program listens there, or the versions do not fit",
        "meshnet --version on both hosts; if they are equal, report it with both sidecars' logs",
    ),
    Reason.TUNNEL_LOST: Advice(
        "the connection between the two sidecars broke: the other one stopped or the network dropped it",
        "meshnet explain ID on the other host shows its side; if its sidecar restarted, nothing is left to do",
    ),
    Reason.AUTHN_PLAINTEXT: Advice(
        "it came in plain text, and the port is strict",
        "bring the client's host into the mesh (sudo meshnet up), or set the port's mode to permissive",
    ),
    Reason.AUTHN_DISABLED: Advice(
        "it came through a tunnel, and the port's mode is disable",
        "set the port's mode to permissive or strict, or set the endpoint's tunnel to none in the Service",
    ),
    Reason.AUTHZ_DENIED: Advice(
        "an AccessPolicy forbids it, or there are ALLOW policies and none fits this client",
        "compare the client's identity above with the named policy; if it should pass, add it to an ALLOW policy",
    ),
    Reason.AUTHZ_REVOKED: Advice(
        "it was allowed when it opened; then the policies changed, and the new ones forbid it",
        "look at the last change of the named AccessPolicy",
    ),
    Reason.LIMIT_CONNECTIONS: Advice(
        "the service had as many connections as its limits allow, and its queue was full",
        "meshnet conns --to SERVICE --open --sort age shows who holds them; or raise limits.maxConnections",
    ),
    Reason.LIMIT_QUEUE_TIMEOUT: Advice(
        "it waited in the service's queue, and no connection became free in time; or more new tunnels were wanted "
        "at once than this sidecar could shake hands for",
        "meshnet conns --to SERVICE --open --sort age shows who holds them; or raise limits.maxConnections; where the "
        "message speaks of handshakes, connect.totalTimeout",
    ),
    Reason.LIMIT_HOST: Advice(
        "the host of one of the sidecars had no descriptor, port or memory left for one more connection",
        "the message says what was short: raise LimitNOFILE of the sidecar's unit, or net.ipv4.ip_local_port_range; "
        "meshnet conns --open shows what holds them",
    ),
    Reason.BREAKER_OPEN: Advice(
        "every endpoint failed so often of late that its breaker is open; it lets a probe through after a while",
        "meshnet endpoints SERVICE shows each one's last error and when it is probed; mend the endpoint",
    ),
    Reason.ENDPOINT_EJECTED: Advice(
        "its endpoint was ejected, its breaker opened or its checks failed, and the TrafficPolicy says onEject: close",
        "meshnet endpoints SERVICE shows for how long, and the last error; the next connection goes elsewhere",
    ),
    Reason.ENDPOINT_REMOVED: Advice(
        "its endpoint was taken out of the mesh, and the connection outlived timeouts.removed of the TrafficPolicy",
        "nothing, if it was to go; else raise timeouts.removed (0s: such connections live as long as they like)",
    ),
    Reason.IDLE: Advice(
        "nothing moved for as long as timeouts.idle of the TrafficPolicy lets it",
        "raise timeouts.idle for SERVICE, or have the application send something now and then",
    ),
    Reason.HALF_CLOSE_TIMEOUT: Advice(
        "one side had ended, and the other neither ended nor sent anything for timeouts.halfClosed",
        "the application that did not end forgets its connections; raise timeouts.halfClosed if it means to be so slow",
    ),
    Reason.MAX_AGE: Advice(
        "it was older than timeouts.maxAge of the TrafficPolicy; it ended while nothing moved, if that was in time",
        "nothing: the application makes a new one; if it cannot, set timeouts.maxAge: 0s for SERVICE",
    ),
    Reason.REBALANCE: Advice(
        "its endpoint had far more connections than its share, and the TrafficPolicy has such ones made anew elsewhere",
        "nothing: the application makes a new one; if it cannot, set rebalance.above: 0 for SERVICE",
    ),
    Reason.DRAIN: Advice(
        "a sidecar was stopping, and the connection outlived the drain time",
        "nothing if the stop was meant; proxy.drain_timeout in meshnet.toml gives connections longer",
    ),
    Reason.ADMIN_KILLED: Advice(
        "an administrator reset it, on this host or the other one: meshnet conns --kill",
        "nothing if it was meant; whoever was root there can say why. The client may connect again",
    ),
    Reason.PEER_RST: Advice(
        "one of the applications reset the connection, and meshnet passed that on; or, at once, without a byte and in "
        "plain TCP, a sidecar at the endpoint that could not reach its application",
        "look at that application's log: crashes, its own time-outs, data left unread at close. If it does not run, "
        "and its host is in the mesh, start it, and declare the endpoint in the Service with tunnel: meshnet",
    ),
    Reason.KEEPALIVE_DEAD: Advice(
        "a host stopped answering: it is gone, or cannot be reached any more, or the network between lost its state",
        "is the host up? if only idle connections die, look for a firewall or NAT on the way with a short time-out",
    ),
    Reason.LOOP: Advice(
        "the connection was going to the sidecar itself",
        "call the application's own port; sudo meshnet rules verify shows whether the sidecar's traffic is let through",
    ),
    Reason.NOT_REDIRECTED: Advice(
        "it came straight to a port that only takes redirected connections",
        "call the application's own port; if it did, the rules are not in force: sudo meshnet rules verify",
    ),
    Reason.NOT_LOCAL: Advice(
        "another sidecar asked for an address that is not on this host",
        "correct the endpoint's address in the Service: its tunnel ends at a sidecar on another host",
    ),
    Reason.CONFIG_NONE: Advice(
        "the sidecar had not read any mesh configuration yet",
        "meshnet status says what is wrong with it, with file and line",
    ),
    Reason.INTERNAL: Advice(
        "a fault in meshnet itself; the connection was ended rather than guessed about",
        "please report it, with this output and the sidecar's log around that time",
    ),
}
