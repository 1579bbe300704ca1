"""The embedded grid: what `python job.py` runs on. One machine, no network, gone with the script.

Started by `grid.api.connect` as `python -P -m grid.embedded --fd N --early N`; the protocol is described there. Rules: it imports
neither the DHT nor the transport; its files lie in one temporary folder, removed at the end; it ends when its socket does.
The options of the script's header that say how tasks run hold here, too; tags don't choose among one machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import trio

from dht.core.identity import PeerId
from grid import body as bodies
from grid.api import wire
from grid.blobs.store import BlobStore
from grid.config import slots_default
from grid.core import limits
from grid.core.bundle import StageOptions
from grid.core.job import JobId
from grid.jobdata import JobData
from grid.jobplace import JobPlace, fetch_segment
from grid.leader import Leader
from grid.leadjob import serve_driver, shared_bytes
from grid.pack_errors import PackError
from grid.site import Held, Site, SiteStage
from grid.worker.environment import Environment
from grid.worker.pool import WorkerPool
from grid.worker.process import Child
from grid.workshop import Workshop

STORE_SHARE = 0.9
"""Of the disk's free space: it is all gone at the end."""
PRESTARTED = 2
"""Workers started before the first task comes, while the script still pickles it."""
HEADER_MARK = b"[tool.grid]"
"""A script without it is not parsed: it has no options."""
EXIT_HEADER = 2
"""Exit status when the header is wrong; stderr has said what."""


class EveryTag(frozenset[str]):
    """The tags of a machine that was chosen by running the script on it: all."""

    def issuperset(self, other: Iterable[object]) -> bool:
        """Whatever is asked for."""
        return True


async def run(connection: socket.socket, early: socket.socket, origin: dict[str, Any]) -> None:
    """Serve one driver until it goes. Raises PackError: the script's header is wrong."""
    options = _header_options(origin["script"])
    folder = Path(tempfile.mkdtemp(prefix="grid-"))
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_end_on_signal, nursery.cancel_scope)
            await _serve(connection, early, origin, options, folder, nursery)
            nursery.cancel_scope.cancel()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _header_options(script: str) -> dict[str, Any]:
    """The options of the script's header, as submit would have them. Raises PackError."""
    try:
        data = Path(script).read_bytes() if script else b""
    except OSError:  # python -, a notebook's cell, a file that went
        return {}
    if HEADER_MARK not in data:
        return {}
    from grid import pack_header

    return pack_header.read(Path(Path(script).name), data.decode("utf-8", "replace")).options


async def _serve(
    connection: socket.socket,
    early: socket.socket,
    origin: dict[str, Any],
    options: dict[str, Any],
    folder: Path,
    nursery: trio.Nursery,
) -> None:
    job = JobId(secrets.token_bytes(32))
    store = BlobStore(folder / "blobs", int(shutil.disk_usage(folder).free * STORE_SHARE))
    pool = WorkerPool(spare_zygotes=0)
    workshop = Workshop(pool, int(os.environ.get("GRID_SLOTS") or slots_default()))
    workshop.tags = EveryTag()
    await nursery.start(pool.run)
    nursery.start_soon(workshop.watch)
    spool = bodies.Spool(folder / "spool")
    data = JobData(job, store)
    setup = wire.Setup(
        role="worker",
        job=job.hex(),
        job_name=options.get("name") or Path(origin["script"]).name or "session",
        peer=bytes(20).hex(),
        seed=options.get("seed", secrets.randbits(63)),
        script=origin["script"],
        argv=tuple(origin["argv"]),
        workdir=origin["cwd"],
        spool=str(spool.folder),
        name=socket.gethostname().split(".")[0],
    )
    defaults = StageOptions(
        retries=options.get("retries", 0),
        task_timeout_s=options.get("task-timeout", 0.0),
        cpus=options.get("cpus", 1),
        memory_bytes=options.get("memory", 0),
    )
    leader = Leader(job, PeerId(bytes(20)), defaults, spool, _print)
    leader.early = True
    driver = Child("driver", connection, None)
    nursery.start_soon(driver.write)
    environment = Environment.caller(sys.executable, origin["path"], sys.prefix)
    processes = await pool.open_job(setup=setup, environment=environment, early=early)

    async def fetch(stage: SiteStage, held: Held) -> None:
        await fetch_segment(data, stage, held)

    site = leader.site = Site(job, workshop, processes, spool, leader, nursery, fetch, data.serve)
    workshop.sites.append(site)
    for _ in range(min(PRESTARTED, workshop.slots)):
        site.crew.start_worker()
    driver.post(wire.Setup(**{**_fields(setup), "role": "driver", "shared_bytes": shared_bytes()}))
    place = JobPlace(job, folder, spool, data, processes, site, setup)
    nursery.start_soon(_sweep, leader)
    broken = await serve_driver(driver, leader, place, nursery)
    if broken:
        print(f"grid: {broken}", file=sys.stderr)
    site.closed = True
    await processes.aclose()


def _fields(setup: wire.Setup) -> dict[str, Any]:
    return {name: getattr(setup, name) for name in setup.__struct_fields__}


async def _sweep(leader: Leader) -> None:
    while True:
        await trio.sleep(limits.HEARTBEAT_S)
        leader.sweep(trio.current_time())


def _print(peer: PeerId, stage: int, index: int, fd: int, data: bytes) -> None:
    for line in data.splitlines():
        with contextlib.suppress(OSError):
            sys.stderr.buffer.write(b"[%d:%d] %s\n" % (stage, index, line))
    sys.stderr.flush()


async def _end_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP) as signals:
        async for _ in signals:
            scope.cancel()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--early", type=int, required=True)
    arguments = parser.parse_args()
    origin = json.load(sys.stdin)
    connection, early = socket.socket(fileno=arguments.fd), socket.socket(fileno=arguments.early)
    try:
        trio.run(run, connection, early, origin)
    except KeyboardInterrupt:
        pass
    except PackError as error:
        print(f"grid: {error.message}" + (f": {error.hint}" if error.hint else ""), file=sys.stderr)
        sys.exit(EXIT_HEADER)


if __name__ == "__main__":
    main()
