"""A child that makes stages (a driver, or a task that calls `map`), seen from the job's leader.

It translates between the child's own stage numbers and the job's, declares pages, and sends results back under the
child's credit. Rules: what breaks the channel's contract raises RefusedError and the child is ended by its owner; results
over the memory bound are written to the spool folder, the ones needed last first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grid import body as bodies
from grid.api import wire
from grid.body import Body, FileSlice, SpoolFile
from grid.core import limits
from grid.core.bundle import StageOptions
from grid.core.delivery import Delivery
from grid.core.errors import RefusedError
from grid.core.ledger import StageState

if TYPE_CHECKING:
    from grid.leader import Leader

Post = Callable[[wire.ToChild, Body], None]


@dataclass(slots=True)
class Item:
    """A settled range: a result body (skip: its values before the first one that counts), a failure, or neither: cancelled."""

    body: Body | None = None
    skip: int = 0
    failure: wire.Failed | None = None
    exception: bytes = b""


class Producer:
    """One child's stages. `post` sends to the child without waiting."""

    def __init__(self, leader: Leader, post: Post, nested: bool) -> None:
        self._leader = leader
        self._post = post
        self._nested = nested
        self._functions: dict[int, tuple[bytes, Body, str]] = {}
        self._unopened: dict[int, wire.Stage] = {}
        self._stages: dict[int, StageState] = {}
        self._numbers: dict[int, int] = {}
        self._submitted: set[int] = set()  # a driver's stages whose calls are submitted one by one
        self._deliveries: dict[int, Delivery[Item]] = {}
        self._throttled: set[int] = set()
        self._result_bytes = 0
        self.closed = False

    # ---- from the child ----

    def handle(self, message: wire.Message, body: Body) -> None:
        """One frame. Raises RefusedError."""
        if self._leader.replaying is not None and not self._nested:
            self._leader.replaying.frames += 1
        match message:
            case wire.Define(fn, name):
                if bodies.size_of(body) > limits.FUNCTION_BYTES_MAX:
                    raise RefusedError(f"the function {name} is over {limits.FUNCTION_BYTES_MAX >> 20} MiB with what it captured")
                self._functions[fn] = (bodies.hash_of(body), body, name)
            case wire.Stage():
                self._open(message)
            case wire.Page():
                self._page(message, body)
            case wire.Close(stage, total):
                self._leader.close_stage(self._stage(stage), total)
            case wire.Cancel(stage, lo, hi):
                index = self._stage(stage).index
                if hi < 0:
                    self._abandon(index)
                self._leader.cancel(index, lo, hi, record=True)
            case wire.Expect(modules) if not self._nested:
                self._leader.site.crew.expect(modules)
            case wire.Same(number, ranges) if self._leader.replaying is not None and not self._nested:
                self._leader.replaying.same(number, ranges)
            case wire.Consumed(stage, size):
                index = self._stage(stage).index
                delivery = self._deliveries.get(index)
                if delivery is not None:
                    delivery.consumed(size)
                    self._flush(index)
            case _:
                raise RefusedError(f"{type(message).__name__} is no message of a producer")

    def _stage(self, number: int, first: tuple[int, bytes] | None = None) -> StageState:
        stage = self._stages.get(number)
        if stage is None:
            message = self._unopened.pop(number, None)
            if message is None:
                raise RefusedError(f"stage {number} was never opened")
            stage = self._begin(message, first)
        return stage

    def _open(self, message: wire.Stage) -> None:
        if message.fn not in self._functions or message.stage in self._stages or message.stage in self._unopened:
            raise RefusedError("a stage without its function, or opened twice")
        if self._leader.replaying is not None:  # which of the recorded stages it is, its first segment tells
            self._unopened[message.stage] = message
        else:
            self._begin(message, None)

    def _begin(self, message: wire.Stage, first: tuple[int, bytes] | None) -> StageState:
        function = self._functions[message.fn]
        parent = (message.parent_stage, message.parent_index) if self._nested else None
        options = merged(self._leader.defaults, message.options)
        stage = self._leader.open_stage(
            self, function, message.name or function[2], message.ordered, options, parent, message.occurrence, first
        )
        self._stages[message.stage] = stage
        if message.kind == wire.CALLS and not self._nested:
            self._submitted.add(message.stage)
        self._numbers[stage.index] = message.stage
        self._deliveries[stage.index] = Delivery(message.ordered)
        return stage

    def _page(self, message: wire.Page, body: Body) -> None:
        if len(message.counts) != len(message.lengths) or sum(message.lengths) != bodies.size_of(body):
            raise RefusedError("a page whose table doesn't match its bytes")
        refs = message.refs or ((),) * len(message.counts)
        if len(refs) != len(message.counts):
            raise RefusedError("a page whose table doesn't match its bytes")
        pieces = [
            (count, length, tuple(bytes.fromhex(ref) for ref in names))
            for count, length, names in zip(message.counts, message.lengths, refs, strict=True)
        ]
        digests = self._leader.digests(message.lengths, body)
        stage = self._stage(message.stage, (pieces[0][0], digests[0]) if digests else None)
        made_as = message.stage if message.stage in self._submitted else -1
        self._leader.add_page(stage, message.first, pieces, body, digests, made_as)
        if message.final:
            self._leader.close_stage(stage, stage.declared)
        self._throttle(stage)

    def _throttle(self, stage: StageState) -> None:
        over = stage.unsettled > limits.TASKS_AHEAD_MAX or self._leader.argument_bytes > limits.ARGUMENT_BYTES_AHEAD_MAX
        low = stage.unsettled < limits.TASKS_AHEAD_MAX // 2 and self._leader.argument_bytes < limits.ARGUMENT_BYTES_AHEAD_MAX // 2
        if over and stage.index not in self._throttled:
            self._throttled.add(stage.index)
            self._leader.throttled.add(self)
            self._post(wire.Throttle(self._numbers[stage.index], True), b"")
        elif low and stage.index in self._throttled:
            self._throttled.discard(stage.index)
            self._post(wire.Throttle(self._numbers[stage.index], False), b"")

    def relax(self) -> None:
        """Tasks of some stage of the job were settled: let pages come again if that is enough."""
        for index in list(self._throttled):
            self._throttle(self._leader.ledger.stage(index))
        if not self._throttled:
            self._leader.throttled.discard(self)

    # ---- to the child ----

    def settle(self, stage: StageState, lo: int, hi: int, item: Item) -> None:
        """Tasks [lo, hi) have their final word; it goes out when order and credit allow."""
        replaying = self._leader.replaying
        if replaying is not None and not self._nested and not stage.ordered:
            for index, a, b, each in replaying.in_order(stage.index, lo, hi, item):
                self.deliver(index, a, b, each)
        else:
            self.deliver(stage.index, lo, hi, item)

    def compare(self, number: int, index: int, first: int, count: int, old: bytes, new: bytes) -> bool:
        """Ask the driver which items of two segments are the same."""
        if self.closed or self._nested:
            return False
        self._post(wire.Compare(number, self._numbers[index], first, count, len(old)), old + new)
        return True

    def deliver(self, index: int, lo: int, hi: int, item: Item) -> None:
        """Put it among what goes to the child."""
        delivery = self._deliveries.get(index)
        if self.closed or delivery is None:
            if item.body is not None:
                bodies.release(item.body)
            return
        size = bodies.size_of(item.body) if item.body is not None else 0
        delivery.add(lo, hi, size, item)
        if item.body is not None:
            self._result_bytes += bodies.memory_of(item.body)
        self._flush(index)
        if self._result_bytes > limits.RESULT_MEMORY_BYTES_MAX:
            self._spill()

    def _flush(self, index: int) -> None:
        number = self._numbers[index]
        delivery = self._deliveries[index]
        for lo, hi, item in delivery.ready():
            if item.body is not None:
                self._result_bytes -= bodies.memory_of(item.body)
                self._post(wire.Result(number, lo, hi, "", item.skip), item.body)
            elif item.failure is not None:
                failure = item.failure
                self._post(
                    wire.Failure(number, lo, failure.kind, failure.type_name, failure.message, failure.traceback),
                    item.exception,
                )
            else:
                self._post(wire.Cancelled(number, lo, hi), b"")
            if self.closed:  # by the post: its peer can't be reached
                return

    def _spill(self) -> None:
        """Write waiting results to disk, as many as bring memory under half the bound, into one file."""
        data: list[bytes] = []
        items: list[Item] = []
        total = 0
        for item in (item for delivery in reversed(self._deliveries.values()) for item in delivery.waiting()):
            if isinstance(item.body, bytes) and item.body:
                items.append(item)
                data.append(item.body)
                total += len(item.body)
                if self._result_bytes - total < limits.RESULT_MEMORY_BYTES_MAX // 2:
                    break
        if not items:
            return
        file: SpoolFile = self._leader.spool.write("results", b"".join(data))
        file.owners = len(items)
        at = 0
        for item, piece in zip(items, data, strict=True):
            item.body = FileSlice(file, at, len(piece))
            at += len(piece)
        self._result_bytes -= total

    def close(self) -> None:
        """The child is gone: what it waited for is no longer wanted."""
        self.closed = True
        for stage in self._stages.values():
            self._abandon(stage.index)
            if not stage.complete:
                self._leader.cancel(stage.index, 0, -1)
        self._leader.throttled.discard(self)

    def _abandon(self, index: int) -> None:
        """The child wants nothing more of this stage."""
        delivery = self._deliveries.pop(index, None)
        for item in delivery.waiting() if delivery is not None else ():
            if item.body is not None:
                self._result_bytes -= bodies.memory_of(item.body)
                bodies.release(item.body)
        self._throttled.discard(index)


def merged(defaults: StageOptions, options: wire.Options) -> StageOptions:
    """A stage's options over the job's."""
    return StageOptions(
        retries=defaults.retries if options.retries is None else max(0, options.retries),
        task_timeout_s=defaults.task_timeout_s if options.task_timeout_s is None else max(0.0, options.task_timeout_s),
        cpus=defaults.cpus if options.cpus is None else max(1, options.cpus),
        memory_bytes=defaults.memory_bytes if options.memory_bytes is None else max(0, options.memory_bytes),
        tags=tuple(sorted({*defaults.tags, *options.tags})),
        pure=options.pure,
    )
