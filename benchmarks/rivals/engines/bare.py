"""No engine: forked processes that each do their share of the tasks. Nobody can be better; what is lost is the machine's."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any, ClassVar

from benchmarks.rivals.engines.base import Engine


def serve(connection: Connection) -> None:
    """A worker: one share at a time."""
    while True:
        given = connection.recv()
        if given is None:
            return
        function, items = given
        connection.send([function(item) for item in items])


class Bare(Engine):
    """Shares are cut beforehand: right only for tasks of one length."""

    name = "bare"
    rows: ClassVar[frozenset[str]] = frozenset({"efficiency"})

    def start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.pipes: list[Connection] = []
        self.processes = []
        for _ in range(self.workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        for number, pipe in enumerate(self.pipes):
            pipe.send((function, items[number :: self.workers]))
        for pipe in self.pipes:
            yield from pipe.recv()
