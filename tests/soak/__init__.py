"""The soak: real clients through real sidecars for hours, while things go wrong at random; see scripts/soak.

- stage.py: the hosts, their sidecars and keepers, and the servers.
- talk.py, websocket.py: programs of the soak's own, and who talks to them for long.
- clients.py: who calls what, again and again, and what each call came to.
- faults.py: what goes wrong, one after the other; kind.py: what a fault is, and which clients may notice.
- sidecars.py, links.py, shortages.py, endpoints.py, storms.py: the faults, by what they befall.
- judge.py: whether every failed call has a fault that explains it, and whether the books balance.
"""
