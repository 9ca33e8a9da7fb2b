"""THE COMMANDS: one file each, holding its definition and its `command`. They talk to a sidecar over its admin socket.

main.py finds a command by name and imports nothing else, so `meshnet conns` starts as fast as its own imports allow.
"""
