"""meshnet side by side with HAProxy. Run it as scripts/bench.

__main__  the command: options, rounds, where results go
tests     what is measured, and what each test's figures are
subjects  what is compared: direct, HAProxy, meshnet, each on two hosts of its own, checked before it is measured
load      the server and the clients (load.c), and what they say
figures   medians, ratios, verdicts (pure)
report    the Markdown (pure)
"""
