"""SEVERAL PROCESSES AS ONE SIDECAR: a parent that holds the listeners and answers for its workers, who do the work.

__main__    the program of one worker
line        what parent and worker say to each other, and how each learns that the other is gone
worker      one worker as the parent sees it: started, asked, started again
parent      the workers of a sidecar together, and their end
answers     what the parent answers: each worker is asked, and
merge       their answers become one, as do
sums        their metrics
"""
