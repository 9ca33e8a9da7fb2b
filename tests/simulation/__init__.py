"""Whole sidecars in virtual time: everything of a connection's life is real but for its bytes and its network.

`network.py` takes the place of the kernel, of tunnels and of the relay; trio's MockClock that of time. The same seed is
the same run, event for event.
"""
