"""Feeding a map: from its iterables to segments, lazily, in bounded memory.

Rules this file keeps:

- sequences of builtin types are cut in the calling thread for CALLER_S, the rest and everything that may block in a
  thread of its own;
- each item is frozen before the next is taken from an iterator, but for numbers, which nobody can change;
- nothing more is taken while the peer says hold, or while the reader is AHEAD_TASKS_MAX behind.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from grid.api.errors import GridError
from grid.api.map_stage import SEGMENT_TASKS_MAX, MapStage
from grid.api.stages import SEGMENT_BYTES

CALLER_S = 0.005
"""How long a call of map cuts its input itself: most inputs are through by then, and a thread costs 0.1 ms."""
AHEAD_TASKS_MAX = 1 << 18
"""Tasks sent but not read, once reading has begun: an endless input must not fill the peer's disk."""
FIRST_BUDGET = 1
BUDGET_GROWTH = 16
NUMBERS = frozenset({int, float, bool, complex, type(None)})
_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_SIZED: tuple[type, ...] = (set, frozenset, dict, str, bytes, bytearray, deque, *_VIEWS)
_COPY_ITEMS_MAX = 100_000


def start(stage: MapStage, iterables: tuple[Iterable[Any], ...]) -> None:
    """Begin to feed the stage and return soon; user code in it may raise in this thread only before the first item."""
    sources = [_as_sequence(iterable) for iterable in iterables]
    rest = 0
    if all(source is not None for source in sources):
        sequences: list[Sequence[Any]] = [source for source in sources if source is not None]
        try:
            rest = _feed_sequences(stage, sequences, 0, time.monotonic() + CALLER_S)
        except GridError:
            raise
        except Exception as error:
            stage.closed(error)
            return
        if rest < 0:
            return
        work: Any = lambda: _feed_sequences(stage, sequences, rest, None)  # noqa: E731
    else:
        try:
            iterator = iter(iterables[0]) if len(iterables) == 1 else iter(zip(*iterables, strict=False))
        except BaseException:
            stage.cancel("its input can't be iterated")
            raise
        work = lambda: _feed_iterator(stage, iterator)  # noqa: E731
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(_run, stage, work), name=f"grid-feed-{stage.number}", daemon=True).start()


def _run(stage: MapStage, work: Any) -> None:
    try:
        work()
    except GridError as error:
        if stage.session.error is None:
            _close(stage, error)
    except BaseException as error:
        _close(stage, error)


def _close(stage: MapStage, error: BaseException) -> None:
    try:
        stage.closed(error)
    except GridError:
        stage.fail(stage.session.error or GridError("the grid went away"))


def _as_sequence(iterable: Any) -> Sequence[Any] | None:
    """The iterable, if slicing it and asking its length can neither block nor run user code."""
    kind = type(iterable)
    if kind is list or kind is tuple or kind is range:
        return iterable  # type: ignore[no-any-return]
    if kind in _SIZED and len(iterable) <= _COPY_ITEMS_MAX:
        return tuple(iterable)
    if kind.__module__ == "numpy" and kind.__name__ == "ndarray" and iterable.ndim and not iterable.dtype.hasobject:
        return iterable  # type: ignore[no-any-return]
    return None


def _feed_sequences(stage: MapStage, sequences: list[Sequence[Any]], position: int, deadline: float | None) -> int:
    """Feed from `position` on; return -1 when all is sent, else where to go on because the deadline passed."""
    single = sequences[0] if len(sequences) == 1 else None
    as_slices = single is not None and type(single) not in (list, tuple) and _slices_well(single)
    step = SEGMENT_TASKS_MAX if as_slices else 4096
    if as_slices and not isinstance(single, range):
        step = max(1, SEGMENT_BYTES * 3 // 4 // _row_bytes(single))
    while not stage.over:
        if not _may_go_on(stage, wait=deadline is None) or (deadline is not None and time.monotonic() > deadline):
            return position
        ahead = stage.recorded or step
        if single is not None:
            chunk = single[position : position + ahead]
        else:
            slices = [sequence[position : position + ahead] for sequence in sequences]
            chunk = list(zip(*slices, strict=False))
        if not len(chunk):
            stage.closed(None)
            return -1
        if as_slices or (single is not None and _is_batch(stage, chunk)):
            size = stage.add_batch(chunk if type(chunk) is not tuple else list(chunk))
            if not as_slices:
                step = max(1, min(SEGMENT_TASKS_MAX, SEGMENT_BYTES * len(chunk) // size))
            position += len(chunk)
        else:
            position = _feed_chunk(stage, chunk, position, deadline)
    return -1


def _feed_chunk(stage: MapStage, chunk: Sequence[Any], position: int, deadline: float | None) -> int:
    for item in chunk:
        stage.add(item)
        position += 1
        if stage.full and not _may_go_on(stage, wait=deadline is None):
            break
        if deadline is not None and not position & 63 and time.monotonic() > deadline:
            break
    return position


def _is_batch(stage: MapStage, chunk: Sequence[Any]) -> bool:
    """Whether the items make a segment of their own. They don't when a replay stands in the middle of one."""
    return NUMBERS.issuperset(map(type, chunk)) and not (stage.recorded and stage.gathered)


def _slices_well(sequence: Any) -> bool:
    """Whether slices of it are small and hold the very items that iterating gives."""
    return type(sequence) is range or _row_bytes(sequence) < SEGMENT_BYTES // 2


def _row_bytes(array: Any) -> int:
    return max(1, int(array[:1].nbytes))


def _feed_iterator(stage: MapStage, iterator: Iterator[Any]) -> None:
    stage.session.flush_often(stage, True)
    try:
        odd = _feed_numbers(stage, iterator)
        if odd is not _END:
            stage.add(odd)
            stage.send_soon()
            for item in iterator:
                stage.add(item)
                if stage.full and not _may_go_on(stage, wait=True):
                    return
    finally:
        stage.session.flush_often(stage, False)
    stage.closed(None)


_END = object()


def _feed_numbers(stage: MapStage, iterator: Iterator[Any]) -> Any:
    """Feed as long as numbers come; return the first item that is none, or _END."""
    budget = left = FIRST_BUDGET
    append = stage.run.append
    for item in iterator:
        if type(item) not in NUMBERS:
            stage.take_run()
            return item
        append(item)
        left -= 1
        if not left:
            stage.take_run()
            stage.send_soon()
            budget = left = min(budget * BUDGET_GROWTH, SEGMENT_TASKS_MAX // 2)
            if not _may_go_on(stage, wait=True):
                return _END
    stage.take_run()
    return _END


def _may_go_on(stage: MapStage, wait: bool) -> bool:
    """Whether more may be sent; with `wait`, wait until it may: then False means that the stage is over."""
    if not stage.held and not (stage.reading and stage.sent - stage.delivered > AHEAD_TASKS_MAX):
        return not stage.over
    if not wait:
        return False
    with stage.changed:
        stage.changed.wait_for(
            lambda: stage.over or not (stage.held or (stage.reading and stage.sent - stage.delivered > AHEAD_TASKS_MAX))
        )
    return not stage.over
