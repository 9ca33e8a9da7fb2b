"""Who calls, again and again, each in a thread of its own, until it is enough."""

import hashlib
import json
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Self

from meshnet_cli.demo.world import Host, ProgramFailed
from tests.soak.judge import Call
from tests.soak.kind import CACHE_CLIENT, EVERYBODY, GREETERS, LONG_TALK
from tests.soak.stage import (
    ADDRESSES,
    BULK,
    CACHE,
    CONTENT,
    DATABASE,
    ECHO,
    GREETER,
    LOGIN,
    WEB_SITE,
    WEBSOCKET,
    Stage,
)
from tests.soak.talk import LongTalk, greet
from tests.soak.websocket import Conversation
from tests.traffic import servers

_PAUSE = 0.05  # seconds between a client's calls; longer after one that failed
_PATIENCE = 20.0  # seconds for a program


class Clients:
    """They call within the block; leaving it waits for the calls that are under way. `calls` grows."""

    def __init__(self, stage: Stage) -> None:
        self.calls: list[Call] = []
        self._stage = stage
        self._enough = threading.Event()
        self._works: dict[str, Callable[[], None]] = {
            "curl": self._curl,
            CACHE_CLIENT: self._redis,
            "postgres": self._postgres,
            "iperf3": self._iperf3,
            "ssh": self._ssh,
            LONG_TALK: partial(self._lasting, LongTalk, ECHO),
            "websocket": partial(self._lasting, Conversation, WEBSOCKET),
        }
        greeting = partial(greet, stage.web, ADDRESSES[GREETER], GREETER)
        self._works |= dict.fromkeys(sorted(GREETERS), greeting)
        assert self._works.keys() == EVERYBODY
        self._talks: dict[int, LongTalk | Conversation] = {}
        self._threads = [threading.Thread(target=self._go_on, args=item) for item in self._works.items()]

    def __enter__(self) -> Self:
        self._run(self._stage.web, "pgbench", "-i", "-q", "-s", "1", *self._database())
        for thread in self._threads:
            thread.start()
        return self

    @property
    def names(self) -> list[str]:
        return list(self._works)

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join()
        for talk in self._talks.values():
            talk.close()

    def _go_on(self, name: str, work: Callable[[], None]) -> None:
        while not self._enough.is_set():
            began, error = time.monotonic(), ""
            try:
                work()
            except (OSError, EOFError, ProgramFailed, subprocess.TimeoutExpired, ValueError) as problem:
                error = f"{type(problem).__name__}: {problem}".replace("\n", " ")
            self.calls.append(Call(name, began, time.monotonic(), error))
            self._enough.wait(_PAUSE if not error else 10 * _PAUSE)

    def _curl(self) -> None:
        file = self._stage.web.directory / "content"
        url = f"http://{ADDRESSES[WEB_SITE]}:{WEB_SITE}/content"
        self._run(self._stage.web, "curl", "-sSf", "--max-time", "15", "-o", str(file), url)
        if hashlib.sha256(file.read_bytes()).digest() != hashlib.sha256(CONTENT).digest():
            raise ValueError("curl has got something else")

    def _redis(self) -> None:
        there = ("-h", ADDRESSES[CACHE], "-p", str(CACHE))
        said = self._run(self._stage.web, "redis-benchmark", *there, "--csv", "-n", "500", "-c", "5", "-t", "set,get")
        if [line.split(",")[0] for line in said.splitlines()[1:]] != ['"SET"', '"GET"']:
            raise ValueError(f"redis-benchmark said {said}")

    def _postgres(self) -> None:
        said = self._run(self._stage.web, "pgbench", "-n", "-c", "2", "-t", "10", *self._database())
        if "number of transactions actually processed: 20/20" not in said:
            raise ValueError(f"pgbench said {said}")

    def _iperf3(self) -> None:
        there = ("-c", ADDRESSES[BULK], "-p", str(BULK), "--connect-timeout", "3000")
        try:
            said = self._run(self._stage.web, "iperf3", "-J", "-t", "1", "-b", "50M", *there)
            if "error" in json.loads(said):
                raise ValueError(f"iperf3 said {said}")
        except (ProgramFailed, subprocess.TimeoutExpired):
            self._stage.restart_bulk()  # it serves one at a time, and may wait for one that is gone
            raise

    def _ssh(self) -> None:
        """A file there and back by scp, and what a shell over there says of it."""
        here, back = (self._stage.web.directory / name for name in ("ssh-content", "ssh-back"))
        here.write_bytes(CONTENT)
        there, name = self._stage.api.directory / "ssh-content", f"{servers.LOGIN}@{ADDRESSES[LOGIN]}"
        key = self._stage.key
        known = key.with_name("known_hosts")
        options = ("-F", "none", "-i", str(key), "-o", f"UserKnownHostsFile={known}", "-o", "ConnectTimeout=10")
        options += ("-o", "BatchMode=yes", "-o", "LogLevel=ERROR")
        self._run(self._stage.web, "scp", "-q", *options, "-P", str(LOGIN), str(here), f"{name}:{there}")
        said = self._run(self._stage.web, "ssh", *options, "-p", str(LOGIN), name, "sha256sum", str(there))
        self._run(self._stage.web, "scp", "-q", *options, "-P", str(LOGIN), f"{name}:{there}", str(back))
        digest = hashlib.sha256(CONTENT)
        if said.split()[0] != digest.hexdigest():
            raise ValueError(f"what scp brought has another hash: {said}")
        if hashlib.sha256(back.read_bytes()).digest() != digest.digest():
            raise ValueError("scp has brought back something else")

    def _lasting(self, kind: type[LongTalk] | type[Conversation], port: int) -> None:
        """One more exchange on the connection there is; a new one after one that failed."""
        if port not in self._talks:
            self._talks[port] = kind(self._stage.web, ADDRESSES[port], port)
        try:
            self._talks[port].say()
        except (OSError, EOFError):
            self._talks.pop(port).close()
            raise

    def _database(self) -> tuple[str, ...]:
        return ("-h", ADDRESSES[DATABASE], "-p", str(DATABASE), "-U", "app", "postgres")

    def _run(self, host: Host, *command: str) -> str:
        return host.run(*command, timeout=_PATIENCE, PGSSLMODE="disable", PGCONNECT_TIMEOUT="10").stdout
