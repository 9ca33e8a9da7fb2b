"""What goes wrong around and inside a mesh: for each fault what the client sees, and what both sides record of it.

Each test is named after its fault. After each, the books of every sidecar must balance: see conftest.py. Faults that
other files have are not here again:

| fault | where |
|---|---|
| the endpoint refuses; all of them do; one of three | traffic/test_retry.py, proxy/test_ends.py, proxy/test_orders.py |
| its sidecar refuses, or something else listens there | proxy/test_identity.py, traffic/test_retry.py |
| the application resets, before or after a FIN, or leaves words unread | proxy/test_ends.py, traffic/test_ends.py |
| it half-closes and hears on; queues; drains | proxy/test_ends.py, test_protection.py, test_drain.py |
| it fails in a row, and comes back | traffic/test_breaker.py, proxy/test_protection.py |
| a kept tunnel is dead, or its peer says nothing | proxy/test_pool.py, test_pool_upkeep.py, test_asked_orders.py |
| a sidecar restarts while it is called | proxy/test_pool.py; workers of it: proxy/workers/test_deaths.py |
| a certificate is renewed, or does not fit its key | proxy/test_config.py |
| a certificate of a peer without a sidecar is no good | proxy/test_identity.py |
| mesh files are broken, gone, or unreadable; a restart then | proxy/test_config.py, test_follow.py, test_restart.py |
| a thousand connections to a cold peer | proxy/test_burst.py |
| who reads the log is stuck, or gone | proxy/test_access_log.py |
| rules vanish, keepers and supervisors die | proxy/test_capture.py, init/test_keep.py, cli/test_deaths.py |
| frames by the million, under libFuzzer and hypothesis | relay/native/fuzz_frames.c, tunnel/test_protocol_fuzz.py |

Garbage by the million, on every port: `MESHNET_GARBAGE=10000000 scripts/test --deep tests/faults/test_garbage.py`.
"""
