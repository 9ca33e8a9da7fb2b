"""Whole Debian machines that boot systemd, for what only they can show: see scripts/test-machines."""
