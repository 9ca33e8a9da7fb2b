"""How the work grows with the mesh, with open connections, and in a storm of new ones: scripts/bench --growth.

__main__      the command: the whole report
mesh          endpoints and services, in a loop of our own
room          how many open connections there is room for, and why not for more (pure)
connections   open connections, through two real sidecars
storm         many new connections at once, through two real sidecars, and an exact account of them
sidecars      two sidecars, what they tell of themselves, and how long that takes
table         a table of Markdown (pure)
"""
