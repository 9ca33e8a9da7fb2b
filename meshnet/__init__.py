"""meshnet: a service mesh for TCP that no application has to know about.

The house, from the ground up. Imports go down only.

    errors    why a connection or a command failed, each with its stable reason code
    model     what things are: frozen structs, nothing else
    codec     how they look as bytes; parsers that never touch a socket
    decide    what to do: values in, a decision out; clock and dice are parameters
    net       what Linux can do: original destination, listeners, marks, TLS
    relay     how bytes move between two legs
    tunnel    how two sidecars talk: meshnet/1 and the pool of tunnels
    proxy     the sidecar; outbound.py and inbound.py each read as one connection's life
    control   the control plane; today the authority that issues certificates

Beside it, in their own source roots: meshnet_init (the kernel's redirect rules) and meshnet_cli (the commands).
"""

__version__ = "0.1.0"
