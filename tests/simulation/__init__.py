"""Whole sidecars in virtual time: everything of a connection's life is real but for its bytes and its network.

`network.py` takes the place of the kernel, `tunnels.py` that of TCP and TLS between sidecars, `relay.py` that of the
relay; `sidecar.py` starts, drains and restarts what is real; `mesh.py` is what happens to all of them. trio's MockClock
takes the place of time. The same seed is the same run, event for event.
"""
