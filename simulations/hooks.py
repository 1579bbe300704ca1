"""Where a world listens: messages that peers handle, bytes that they release. Put in place for one run, then taken away."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, get_args

import trio

from dht.core import identity
from dht.core.identity import PeerId
from grid.blobs import layout
from grid.core import raft_base, raft_log
from grid.core.deque import Work
from grid.core.messages import AnyMessage
from grid.core.raft import Raft
from grid.dispatch import Dispatch
from grid.jobview import JobView
from grid.leader import Leader
from grid.leading import Leading
from grid.replica import Replica
from grid.replica_files import Book
from simulations.sources import here
from simulations.trace import digest

if TYPE_CHECKING:
    from simulations.world import World


SMALL: list[tuple[Any, str, Any]] = [
    (Raft, "append_entries_max", 1),
    (Raft, "snapshot_chunk_bytes", 512),
    (raft_base, "LOG_BYTES_SNAPSHOT", 4 << 10),
    (raft_log, "LOG_TRAIL_BYTES_MAX", 1 << 10),
]
"""The core's bounds where `small_batches` is asked for."""
NAMES: dict[bytes, str] = {bytes((kind.__struct_config__.tag,)): kind.__name__ for kind in get_args(AnyMessage)}
ARRAY_16 = b"\xdc"
"""Msgpack's array with a count of two bytes; shorter ones have it in their first."""
FOUND_AT = 7
"""Where `found` stands among Replica's arguments after the book."""


_real_sign_open = identity.crypto_sign_open  # type: ignore[attr-defined]


@lru_cache(maxsize=4096)
def _sign_open(signed: bytes, public: bytes) -> bytes:
    """Every peer of a world checks the same signatures in one process: what was found good is good."""
    opened: bytes = _real_sign_open(signed, public)
    return opened


CHEAP: list[tuple[Any, str, Any]] = [
    (identity, "crypto_sign_open", _sign_open),
    (layout, "SHARDS", ("",)),
    (layout.Layout, "path", lambda self, blob: self.root / blob.hex()),
]
"""Pure functions that remember, and one folder for a store's blobs instead of 256."""


def _name(message: bytes) -> str:
    """The type that its tag names: the first item of its array."""
    at = 1 if message[:1] < ARRAY_16 else 3
    return NAMES.get(message[at : at + 1], "?")


class Faults(logging.Handler):
    """What a peer logs as an error is one: nothing here may surprise it."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        host: Any = here.get()
        if host is not None and host.killed:
            return
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, trio.Cancelled):
            where = host.name if host is not None else "nowhere"
            self._world.violation(f"logged on {where}: {record.name}: {record.getMessage()}", error)


@contextlib.contextmanager
def installed(world: World) -> Iterator[None]:
    """Trace and check."""
    on_message, on_request = Dispatch.on_message, Dispatch.on_request
    write, write_at, sweep = JobView.write, JobView.write_at, Leader.sweep
    names: dict[bytes, str] = {}

    def name_of(peer: bytes) -> str:
        if peer not in names:
            names.update({bytes(host.identity.id): host.name for host in world.hosts})
        return names.get(peer, "?")

    async def traced_message(self: Dispatch, peer: PeerId, message: bytes) -> None:
        host: Any = here.get()
        kind, by = _name(message), name_of(peer)
        world.trace.add("message", by, host.name, kind, len(message), digest(message))
        world.meter.add(by, host.name, kind, len(message), False)
        await on_message(self, peer, message)

    async def traced_request(self: Dispatch, peer: PeerId, message: bytes) -> bytes:
        host: Any = here.get()
        kind, by = _name(message), name_of(peer)
        world.trace.add("request", by, host.name, kind, len(message), digest(message))
        world.meter.add(by, host.name, kind, len(message), True)
        return await on_request(self, peer, message)

    def released(view: JobView, fd: int, at: int, data: bytes) -> None:
        host: Any = here.get()
        world.trace.add("release", host.name, fd, at, digest(data))
        world.checks.released(view.log(fd).path.parent.name, host.name, fd, at, data)

    def checked_write(self: JobView, fd: int, data: bytes) -> None:
        released(self, fd, self.log(fd).length, data)
        write(self, fd, data)

    def checked_write_at(self: JobView, fd: int, at: int, data: bytes) -> None:
        released(self, fd, at, data)
        write_at(self, fd, at, data)

    def checked_sweep(self: Leader, now_s: float) -> list[Work]:
        requeued = sweep(self, now_s)
        world.checks.requeued(self, requeued, now_s)
        return requeued

    replaced: list[tuple[Any, str, Any]] = [
        (Dispatch, "on_message", traced_message),
        (Dispatch, "on_request", traced_request),
        (JobView, "write", checked_write),
        (JobView, "write_at", checked_write_at),
        (Leader, "sweep", checked_sweep),
        *_ledger(world),
        *CHEAP,
        *(SMALL if world.scenario.small_batches else []),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    faults = Faults(world)
    loggers = [logging.getLogger(name) for name in ("grid", "dht")]
    told = [(logger.level, logger.propagate) for logger in loggers]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    for logger in loggers:
        logger.addHandler(faults)
        logger.setLevel(logging.ERROR)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, told, strict=True):
            logger.removeHandler(faults)
            logger.setLevel(level)
            logger.propagate = propagate
        for owner, name, value in before:
            setattr(owner, name, value)


def _ledger(world: World) -> list[tuple[Any, str, Any]]:
    """What the ledger's checkers are told."""
    groups = world.groups
    init, do, write, handle = Replica.__init__, Replica._do, Book.write, Raft.handle
    applied, restored, took_over = Leading.applied, Leading.restored, Leading.took_over
    core_of: dict[int, tuple[Book, Any]] = {}

    def began(self: Replica, book: Book, *arguments: Any, **options: Any) -> None:
        init(self, book, *arguments, **options)
        core_of[id(book)] = book, self.raft
        found = options.get("found", arguments[FOUND_AT] if len(arguments) > FOUND_AT else None)
        groups.began(self, book.durable, found is not None)

    def handled(self: Any, event: Any, now_s: float) -> list[Any]:
        effects = handle(self, event, now_s)
        groups.decided(self, event, effects)
        return effects

    async def written(self: Book, persists: Sequence[Any]) -> None:
        raft = core_of[id(self)][1]
        groups.writes(raft, raft.node, persists)
        await write(self, persists)
        host: Any = here.get()
        for effect in persists:
            world.trace.add("persist", host.name, effect.point)
            groups.did(raft, effect)

    async def done(self: Replica, effect: Any) -> None:
        await do(self, effect)
        groups.did(self.raft, effect)

    def told(self: Leading, replica: Replica, fact: Any) -> None:
        groups.applied(replica, _host(), fact)
        applied(self, replica, fact)

    def replaced(self: Leading, replica: Replica) -> None:
        groups.restored(replica, _host())
        restored(self, replica)

    def leads(self: Leading, replica: Replica, term: int) -> None:
        world.trace.add("leads", _host(), term)
        groups.took_over(replica, _host(), term)
        took_over(self, replica, term)

    return [
        (Replica, "__init__", began),
        (Raft, "handle", handled),
        (Book, "write", written),
        (Replica, "_do", done),
        (Leading, "applied", told),
        (Leading, "restored", replaced),
        (Leading, "took_over", leads),
    ]


def _host() -> str:
    host: Any = here.get()
    return str(host.name)
