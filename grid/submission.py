"""From what a command staged to a job's spec: files become durable blobs, options take their types.

Rules: all blobs of one submission are pinned under one name until the job is over (or was refused); what is wrong is said in
one line, and nothing is kept then.
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from grid.api.client import ControlError
from grid.blobs.blob import StoreFull
from grid.core import limits
from grid.core.job import BlobRef, JobOptions, JobSpec

if TYPE_CHECKING:
    from grid.peer import Peer


async def make_spec(peer: Peer, submission: dict[str, Any], pins: str) -> tuple[JobSpec, list[BlobRef]]:
    """Adopt the staged files, pinned for `pins`, and make the spec; with all blobs that the job needs. Raises ControlError."""
    try:
        return await _make(peer, submission, pins)
    except OSError as error:
        peer.services.store.unpin(pins)
        raise ControlError("staging", f"the submission can't be read: {error.strerror or error}") from None
    except StoreFull as error:
        peer.services.store.unpin(pins)
        raise ControlError("disk-full", str(error), "free space, or give the peer a home on a larger disk") from None


async def _make(peer: Peer, submission: dict[str, Any], pins: str) -> tuple[JobSpec, list[BlobRef]]:
    store = peer.services.store
    store.leave_free(limits.FREE_BYTES_MIN)
    options = submission.get("options") or {}
    blobs: list[BlobRef] = []

    def needed(ref: BlobRef) -> BlobRef:
        blobs.append(ref)
        return ref

    async def adopt(path: str) -> BlobRef:
        size = os.stat(path).st_size
        return needed(BlobRef(bytes(await store.adopt(Path(path), owner=pins, durable=True)), size))

    async def put(data: bytes) -> BlobRef:
        return needed(BlobRef(bytes(await store.put(data, owner=pins, durable=True)), len(data)))

    for pack in submission.get("pack_paths") or ():
        await adopt(str(pack))
    stdin, lock = options.get("stdin"), submission.get("lock")
    spec = JobSpec(
        nonce=secrets.token_bytes(16),
        grid=peer.membership.grid,
        submitter=peer.identity.public,
        owner=bytes(peer.membership.owner),
        name=str(submission["name"]),
        script=str(submission["script"]),
        argv=tuple(submission["argv"]),
        code=await adopt(str(submission["code"])),
        python=str(submission["python"]),
        seed=int(options["seed"]) if options.get("seed") is not None else secrets.randbits(63),
        created_s=time.time(),
        options=job_options(options),
        lock=await put(lock.encode()) if lock else None,
        inputs=await adopt(str(submission["manifest"])) if submission.get("manifest") else None,
        stdin=await put(await trio.Path(str(stdin)).read_bytes()) if stdin else None,
        env=tuple(sorted((submission.get("env") or {}).items())),
        replicas=tuple(await peer.candidates(job_options(options).replicas)),
        owner_name=peer.owner_name,
    )
    return spec, blobs


def job_options(options: dict[str, Any]) -> JobOptions:
    """Under the names of the submit options; what was not given has its default."""
    return JobOptions(
        retries=int(options.get("retries") or 0),
        task_timeout_s=float(options.get("task-timeout") or 0.0),
        timeout_s=float(options.get("timeout") or 0.0),
        cpus=int(options.get("cpus") or 1),
        memory_bytes=int(options.get("memory") or 0),
        tags=tuple(options.get("tags") or ()),
        replicas=int(options.get("replicas") or 5),
        strict=bool(options.get("strict")),
        verify=str(options.get("verify") or ""),
        network=bool(options.get("network")),
    )
