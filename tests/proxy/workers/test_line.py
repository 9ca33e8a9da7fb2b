"""The line between parent and worker, with both ends in one process."""

import os
import socket
from contextlib import ExitStack

import pytest
import trio

from meshnet.model.settings import Settings
from meshnet.proxy.workers.line import Brief, ParentsEnd, WorkersEnd

BRIEF = Brief(
    number=3, settings=Settings(), listeners={"outbound": (5, 6), "tunnel": ()}, log_lock=9, ticket_secret=b"x"
)


def workers_end(parent: ParentsEnd) -> WorkersEnd:
    return WorkersEnd(os.dup(parent.other))


async def test_a_worker_gets_its_brief_and_answers_each_call_on_a_stream_of_its_own() -> None:
    with ParentsEnd() as parent, workers_end(parent) as worker:
        parent.begin(BRIEF)
        assert worker.brief() == BRIEF
        async with trio.open_nursery() as nursery:

            async def echo(stream: trio.SocketStream) -> None:
                async with stream:
                    await stream.send_all(await stream.receive_some())

            async def answer() -> None:
                async for stream in worker.calls():
                    nursery.start_soon(echo, stream)

            nursery.start_soon(answer)
            for number in range(20):
                async with parent.call() as stream:
                    await stream.send_all(b"%d" % number)
                    assert await stream.receive_some() == b"%d" % number
            nursery.cancel_scope.cancel()


async def test_when_the_parent_hangs_up_the_calls_end() -> None:
    with ExitStack() as stack:
        with ParentsEnd() as parent:
            worker = stack.enter_context(workers_end(parent))
            parent.begin(BRIEF)
            worker.brief()
            await parent.call().aclose()
        calls = [call async for call in worker.calls()]
        assert len(calls) == 1
        assert await calls[0].receive_some() == b""
        await calls[0].aclose()


def test_a_parent_that_is_gone_before_its_brief_is_no_error() -> None:
    with ParentsEnd() as parent:
        worker = workers_end(parent)
    with worker:
        assert worker.brief() is None


async def test_a_worker_passes_clients_on_until_it_is_gone() -> None:
    with ParentsEnd() as parent:
        with workers_end(parent) as worker:
            parent.begin(BRIEF)
            worker.brief()
            ours, theirs = socket.socketpair()
            worker.pass_on(theirs)
            assert theirs.fileno() == -1
        (client,) = [client async for client in parent.clients()]
    with ours, client:
        client.send(b"yours")
        assert ours.recv(5) == b"yours"


async def test_what_a_parent_cannot_take_is_closed() -> None:
    with ParentsEnd() as parent:
        worker = workers_end(parent)
        parent.begin(BRIEF)
        worker.brief()
    with worker:
        ours, theirs = socket.socketpair()
        worker.pass_on(theirs)
        with ours:
            assert ours.recv(1) == b""


async def test_a_worker_that_is_gone_takes_no_call() -> None:
    with ParentsEnd() as parent:
        with workers_end(parent):
            parent.begin(BRIEF)
        with pytest.raises(OSError):
            parent.call()
