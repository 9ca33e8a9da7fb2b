"""The whole run happens in network namespaces of its own; see tests/world.py."""

pytest_plugins = ["tests.world"]
