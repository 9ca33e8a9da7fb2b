"""The last good mesh on disk: what a sidecar starts with when the files are bad, so that a restart loses nothing."""

from pathlib import Path

from meshnet.codec.snapshot import decode_snapshot, encode_snapshot
from meshnet.model.snapshot import Snapshot
from meshnet.net.files import write_files
from meshnet.proxy.slices import gently


def save(snapshot: Snapshot, file: str) -> None:
    """Replaces the file in one step; only its owner may read it. Raises OSError."""
    where = Path(file)
    write_files(where.parent, {where.name: gently(encode_snapshot(snapshot))})


def load(file: str, version: int) -> Snapshot | None:
    """What `save` wrote, or None if there is nothing, or nothing of this version of meshnet."""
    try:
        with open(file, "rb") as lines:
            return decode_snapshot(gently(lines), version)
    except (OSError, ValueError):
        return None
