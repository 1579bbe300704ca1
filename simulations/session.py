"""A job's end of the local channel in a simulated child: the frames that `grid.api.session` sends, without threads.

It makes stages, sends segments as the real one pickles them, reads results under credit, and serves drivers as well as tasks
that call `map`. Rules: what is cut how is a choice of the session's generator where the real one's depends on time (bursts of
submitted calls), and the same in every run where the real one's does not (the items of a map).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from grid.api import serialize, wire

if TYPE_CHECKING:
    from simulations.processes import SimChild

CREDIT_BYTES = 4 << 10
"""Read bytes are reported once they are this many: small, so that credit matters in small jobs."""


class TaskFailedError(Exception):
    """What a failed task raises in the script that reads it."""


class SimStage:
    """One stage. Values arrive by index; `values` yields them as the stage's order allows."""

    def __init__(self, session: Session, number: int, ordered: bool) -> None:
        self.session = session
        self.number = number
        self.ordered = ordered
        self.sent = 0
        self.total: int | None = None
        self.held = False
        self.settled = 0
        self._arrived: list[tuple[int, Any]] = []
        self._by_index: dict[int, Any] = {}
        self._news = trio.Event()
        self._credit = 0

    def wake(self) -> None:
        self._news.set()
        self._news = trio.Event()

    # ---- sending ----

    def page(self, segments: Sequence[tuple[bytes, int]], final: bool = False) -> None:
        """Send segments (bytes, count of items) as one page."""
        counts = tuple(count for _, count in segments)
        lengths = tuple(len(data) for data, _ in segments)
        first = self.sent
        self.sent += sum(counts)
        if final:
            self.total = self.sent
        self.session.child.say(
            wire.Page(self.number, first, counts, lengths, final=final), b"".join(data for data, _ in segments)
        )

    def close(self) -> None:
        """No page follows."""
        self.total = self.sent
        self.session.child.say(wire.Close(self.number, self.total))
        self.wake()

    # ---- what arrives ----

    def on_result(self, lo: int, hi: int, data: bytes, skip: int) -> None:
        values = serialize.load_results(data, skip, skip + hi - lo)
        assert len(values) == hi - lo, f"{len(values)} values for the {hi - lo} tasks from {lo} on"
        for index, value in enumerate(values, lo):
            self._settle(index, value)
        self._credit += len(data)
        if self._credit >= CREDIT_BYTES:
            self.session.child.say(wire.Consumed(self.number, self._credit))
            self._credit = 0

    def on_failure(self, message: wire.Failure) -> None:
        self._settle(message.index, TaskFailedError(f"{message.kind}: {message.message}"))

    def on_cancelled(self, lo: int, hi: int) -> None:
        for index in range(lo, hi):
            self._settle(index, TaskFailedError("cancelled"))

    def _settle(self, index: int, value: Any) -> None:
        assert index not in self._by_index, f"task {index} of stage {self.number} was told twice"
        self._by_index[index] = value
        self._arrived.append((index, value))
        self.settled += 1
        self.wake()

    async def values(self) -> AsyncIterator[Any]:
        """(index, value), in order or as they come; a failed task's value is a TaskFailedError."""
        at = 0
        while self.total is None or at < self.total:
            if self.ordered and at in self._by_index:
                yield at, self._by_index[at]
                at += 1
            elif not self.ordered and at < len(self._arrived):
                yield self._arrived[at]
                at += 1
            else:
                await self._news.wait()
            await self.session.child.gate()

    async def one(self, index: int) -> Any:
        """The value of one task."""
        while index not in self._by_index:
            await self._news.wait()
        await self.session.child.gate()
        return self._by_index[index]

    async def over(self) -> None:
        """Until all its tasks are settled."""
        while self.total is None or self.settled < self.total:
            await self._news.wait()


class Session:
    """One child's stages."""

    def __init__(self, child: SimChild) -> None:
        self.child = child
        self.stages: dict[int, SimStage] = {}
        self._functions: dict[bytes, int] = {}
        self._occurrence_task = child.task
        self._occurrence = 0

    def take(self, message: Any, body: bytes) -> bool:
        """A frame of the peer; False: it is none of a session's."""
        match message:
            case wire.Result(number, lo, hi, path):
                data = Path(path).read_bytes() if path else body
                if path:
                    Path(path).unlink(missing_ok=True)
                self.stages[number].on_result(lo, hi, data, message.skip)
            case wire.Failure(number):
                self.stages[number].on_failure(message)
            case wire.Cancelled(number, lo, hi):
                self.stages[number].on_cancelled(lo, hi)
            case wire.Compare():
                self.child.say(wire.Same(message.id, _same(message, body)))
            case wire.CompareFunction():
                same = body[: message.old_bytes] == body[message.old_bytes :]
                self.child.say(wire.Same(message.id, ((0, 1),) if same else ()))
            case wire.Throttle(number, hold):
                self.stages[number].held = hold
                self.stages[number].wake()
            case _:
                return False
        return True

    def open(self, function: bytes, name: str, ordered: bool, options: wire.Options | None = None) -> SimStage:
        """A new stage, without tasks."""
        child = self.child
        fn = self._functions.get(function)
        if fn is None:
            fn = self._functions[function] = len(self._functions)
            child.say(wire.Define(fn, name), function)
        if child.task != self._occurrence_task:
            self._occurrence_task, self._occurrence = child.task, 0
        number = len(self.stages)
        stage = self.stages[number] = SimStage(self, number, ordered)
        parent_stage, parent_index, _ = child.task
        child.say(wire.Stage(number, fn, name, ordered, options or wire.Options(), parent_stage, parent_index, self._occurrence))
        self._occurrence += 1
        return stage

    async def finish(self) -> None:
        """Wait for all stages, as at a script's end."""
        for stage in list(self.stages.values()):
            await stage.over()


def _same(question: wire.Compare, body: bytes) -> tuple[tuple[int, int], ...]:
    """Which items of two segments are equal."""
    old = serialize.load_segment(body[: question.old_bytes]).items
    new = serialize.load_segment(body[question.old_bytes :]).items
    return tuple((question.first + at, question.first + at + 1) for at in range(question.count) if old[at] == new[at])


def segment(items: Sequence[Any], kind: int = serialize.ONE) -> tuple[bytes, int]:
    """Items as the real API sends them."""
    writer = serialize.SegmentWriter(kind)
    for item in items:
        if kind == serialize.CALL:
            writer.add_pickled(serialize.pickle_call((item,), None, serialize.ClassTable()))
        else:
            writer.add(item)
    parts, _ = writer.finish()
    return b"".join(bytes(part) for part in parts), len(items)
