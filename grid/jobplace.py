"""What every peer that takes part in a job sets up for it: folder, code, environment, inputs, processes, site.

The same for the leader's peer and for thieves. Rules: the code archive is unpacked with the "data" filter into a folder of
the job alone; nothing of the archive runs here, only in the job's children; closing ends every process of the job.
"""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from dht.core.identity import PeerId
from grid import body as bodies
from grid.api import wire
from grid.core.job import JobId, JobSpec
from grid.core.segments import Segment
from grid.jobdata import JobData
from grid.site import Held, Site, SiteStage, Uplink
from grid.workshop import Workshop

if TYPE_CHECKING:
    from grid.blobs.fetch import Fetcher
    from grid.blobs.store import BlobStore
    from grid.worker.environment import Environment
    from grid.worker.pool import JobProcesses


@dataclass(frozen=True)
class Services:
    """What a peer offers to its jobs."""

    me: PeerId
    name: str
    jobs: Path
    environments: Path
    store: BlobStore
    fetcher: Fetcher | None
    workshop: Workshop
    memory_bytes: int = 0


@dataclass
class JobPlace:
    """One job on this peer, set up."""

    job: JobId
    folder: Path
    spool: bodies.Spool
    data: JobData
    processes: JobProcesses
    site: Site
    setup: wire.Setup


@asynccontextmanager
async def open_place(
    job: JobId,
    spec: JobSpec,
    services: Services,
    uplink: Uplink,
    data: JobData,
    epoch: int,
    nursery: trio.Nursery,
) -> AsyncIterator[JobPlace]:
    """Set a job up here; on exit everything of it but its logs and records is gone.

    Raises EnvironmentFailed, WorkerStartError, GridError (a blob is not to be had), OSError.
    """
    folder = services.jobs / job.hex()
    spool = bodies.Spool(folder / "spool")
    processes: JobProcesses | None = None
    site: Site | None = None
    try:
        environment = await _environment(spec, services, data)
        code = folder / "code"
        await _unpack(await data.read(spec.code), code)
        work = folder / "work"
        work.mkdir(exist_ok=True)
        await _inputs(spec, services, data, folder)
        setup = wire.Setup(
            role="worker",
            job=job.hex(),
            job_name=spec.name,
            peer=services.me.hex(),
            seed=spec.seed,
            script=str(code / spec.script),
            argv=spec.argv,
            workdir=str(work),
            spool=str(spool.folder),
            inputs=str(folder / "inputs") if spec.inputs else "",
            env=dict(spec.env),
            epoch=epoch,
            name=services.name,
        )
        memory = spec.options.memory_bytes or services.memory_bytes // max(1, services.workshop.slots)
        processes = await services.workshop.pool.open_job(setup=setup, environment=environment, memory_bytes_max=memory or None)

        async def fetch(stage: SiteStage, held: Held) -> None:
            await fetch_segment(data, stage, held)

        site = Site(job, services.workshop, processes, spool, uplink, nursery, fetch, data.serve)
        services.workshop.sites.append(site)
        yield JobPlace(job, folder, spool, data, processes, site, setup)
    finally:
        if site is not None:
            site.closed = True
            services.workshop.sites.remove(site)
        with trio.CancelScope(shield=True):
            if processes is not None:
                await processes.aclose()
            data.close()
            spool.close()
            await trio.to_thread.run_sync(clean, folder)
        services.workshop.pump()


async def fetch_segment(data: JobData, stage: SiteStage, held: Held) -> None:
    """Bring a segment's bytes and what its tasks read here. Leaves `held.body` None when they are not to be had."""
    try:
        if held.body is None:
            path = await data.path(held.blob, held.segment.size, held.holders)
            held.body = bodies.whole_file(str(path), owned=False)
        if data.inputs is not None:
            for ref in held.segment.refs:
                await data.inputs.prefetch(ref)
    except Exception as error:  # the range goes back to the leader; the reason shows in `grid explain`
        held.error = str(error)


async def _environment(spec: JobSpec, services: Services, data: JobData) -> Environment | None:
    if spec.lock is None:
        return None
    from grid.worker import environment

    lock = (await data.read(spec.lock)).decode()
    return await environment.ensure(lock, spec.python, services.environments)


async def _inputs(spec: JobSpec, services: Services, data: JobData, folder: Path) -> None:
    if spec.inputs is None:
        return
    from grid.blobs.inputs import InputTree

    data.manifest = await data.path(spec.inputs.id, spec.inputs.size)
    data.inputs = await InputTree.open(services.store, data, data.manifest, folder / "inputs")


async def _unpack(archive: bytes, folder: Path) -> None:
    def unpack() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")

    await trio.to_thread.run_sync(unpack)


def clean(folder: Path) -> None:
    """Remove what taking part in a job left in its folder, and the folder unless it keeps something for later."""
    for name in ("code", "work", "spool", "inputs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    with suppress(OSError):
        folder.rmdir()


__all__ = ["JobPlace", "Segment", "Services", "clean", "open_place"]
