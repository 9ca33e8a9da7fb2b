"""What applications do to those who call them."""

import hashlib
import random
import socket
from collections.abc import Iterator
from functools import partial

from meshnet_cli.demo.world import Host
from tests.faults.causes import pouring
from tests.proxy.programs import accept, listen, read_all
from tests.soak.kind import CACHE_CLIENT, GREETERS, LONG_TALK, SERVERS, Kind, last
from tests.soak.stage import ADDRESSES, ODD, Stage
from tests.soak.talk import SECRET, Mood

_LONG = 1 << 20  # bytes


class Endpoints:
    def __init__(self, stage: Stage, dice: random.Random) -> None:
        self._stage = stage
        self._dice = dice

    def kinds(self) -> Iterator[Kind]:
        talk = GREETERS | {LONG_TALK}
        yield Kind("cache killed", self._kill_cache, frozenset({CACHE_CLIENT}), where=("api",))
        silent, resets, trickles, lingers = (partial(self._be, mood) for mood in Mood if mood is not Mood.USUAL)
        yield Kind("application accepts and never answers", silent, talk, where=SERVERS)
        yield Kind("application resets in the middle of its answers", resets, talk, where=SERVERS)
        yield Kind("application answers byte by byte", trickles, where=SERVERS)
        yield Kind("application lingers when its clients have said their last word", lingers, where=SERVERS)
        yield Kind("one end has said its last word, and the other goes on", self._half_close, where=("api",))

    def _kill_cache(self, host: Host) -> None:
        self._stage.restart_cache()

    def _be(self, mood: Mood, host: Host) -> None:
        talkers = self._stage.talkers[host.name]
        for talker in talkers:
            talker.mood = mood
        last(self._dice.uniform(0.2, 1.0))
        for talker in talkers:
            talker.mood = Mood.USUAL

    def _half_close(self, host: Host) -> None:
        """Each end is the first in turn, and must hear all that the other says later."""
        with listen(host, ODD) as server:
            for first_is_client in (True, False):
                with self._stage.web.connect(ADDRESSES[ODD], ODD) as client, accept(server) as app:
                    first, other = (client, app) if first_is_client else (app, client)
                    self._say_last(first, other, SECRET)
                    last(self._dice.uniform(0.1, 1.0))
                    self._say_last(other, first, SECRET + self._dice.randbytes(_LONG))

    def _say_last(self, end: socket.socket, other: socket.socket, words: bytes) -> None:
        with pouring(end, words):
            heard = read_all(other)
        if hashlib.sha256(heard).digest() != hashlib.sha256(words).digest():
            raise ValueError(f"of {len(words)} bytes of a half-closed connection other {len(heard)} came")
