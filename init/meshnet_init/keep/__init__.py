"""THE KEEPER: it holds the rules to the plan for as long as it runs, whoever changes them.

`keeper.py` reads as its life, top to bottom. `news.py` hears of changes from the kernel, `line.py` of the sidecar's
death, `door.py` answers those who ask.
"""
