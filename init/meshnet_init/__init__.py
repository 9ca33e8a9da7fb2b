"""THE RULES: what sends a host's TCP through the sidecar.

plan and render are pure; backends write a plan into the kernel and read it back; apply, remove and verify are what
`meshnet init`, `meshnet up` and `meshnet rules` call.
"""
