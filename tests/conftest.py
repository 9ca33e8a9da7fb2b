"""The whole run happens in network namespaces of its own; see tests/world.py."""

import signal

pytest_plugins = ["tests.world"]

# A shell that starts the run in the background has it ignore Ctrl-C, and every program that the tests start as well.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
