"""What a bare VM has of meshnet beside a process and rules, and the ways back.

`units` is the systemd units as text (pure), and `systemd` the sidecar as a service of it. `account` is the user and the
groups that the sidecar runs with, and what of the files is theirs; `identity` is made for a host that has none.
`ledger` knows what meshnet made on this host, so that it can take away that and nothing else; `unfinished` is what a
run of `meshnet up` or `meshnet set` has done so far, and `deadman` puts that back when it does not reach its end. One
of these commands runs at a time: `turn`. `ssh` finds the port that the operator came in by, and `host` what the host
has for a sidecar, and what it lacks.
"""
