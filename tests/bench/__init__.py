"""meshnet side by side with HAProxy, nginx and Envoy. Run it as scripts/bench.

__main__    the command: options, where results go
rounds      what is measured when: the subjects of a cell take turns
profile     where meshnet's time goes, with the tools of `tools`
subjects/   what is compared, a file for each: built on hosts of its own, checked before it is measured
load        the server and the clients (generator/, in C), and what they say
machine     what it runs on, how quiet that is, spinners

tests       what is measured, and each test's figures (pure)
targets     what meshnet has to reach (pure)
figures     medians, ratios, verdicts (pure)
table       the rows of the result: every subject's figures, the best peer, the ratio, the verdict (pure)
report      the Markdown (pure)
"""
