"""HOW TWO SIDECARS TALK: the meshnet/1 protocol (protocol.py, sans-io) and the pool of tunnels (pool.py)."""
