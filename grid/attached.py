"""`grid.connect`: another process of this user drives a job on this peer, over its control connection.

The job has a signed spec and thieves like any other, but its driver is not ours to start again: when the connection ends
the job does.
"""

from __future__ import annotations

import io
import secrets
import tarfile
import time
from typing import TYPE_CHECKING, Any

import trio

from grid.api import wire
from grid.control import Call
from grid.core.job import CANCELLED, FAILED, FINISHED, BlobRef, JobId, JobSpec, Outcome, sign_spec
from grid.jobplace import JobPlace
from grid.leader import Leader
from grid.leadjob import LeadJob, serve_driver
from grid.worker.environment import python_minor
from grid.worker.process import Child

if TYPE_CHECKING:
    from grid.peer import Peer


class AttachedJob(LeadJob):
    """A job whose driver is at the other end of a stream."""

    stream: trio.SocketStream

    async def _drive(self, place: JobPlace, leader: Leader, nursery: trio.Nursery) -> Outcome:
        for _ in range(min(2, self._services.workshop.free)):
            place.site.crew.start_worker()
        connection = self.stream.socket
        driver = Child("driver", socket_of(connection), None)
        nursery.start_soon(driver.write)
        driver.post(wire.Setup(**{**{n: getattr(place.setup, n) for n in place.setup.__struct_fields__}, "role": "driver"}))
        broken = await serve_driver(driver, leader, place, nursery)
        if broken:
            return Outcome(FAILED, None, broken)
        cancelled = any(stage.cancelled for stage in leader.ledger.stages if not stage.parent)
        return Outcome(CANCELLED if cancelled else FINISHED, None if cancelled else 0)


def socket_of(connection: trio.socket.SocketType) -> Any:
    """A plain socket on the same connection, for the frame reader, which polls it itself."""
    import socket

    return socket.socket(fileno=connection.detach())


async def run_attached(peer: Peer, call: Call) -> Any:
    """Serve `grid.connect` until its process goes."""
    peer.check_submit()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w"):
        pass
    code = archive.getvalue()
    pins = f"attached:{secrets.token_hex(8)}"
    blob = await peer.services.store.put(code, owner=pins, durable=True)
    spec = JobSpec(
        nonce=secrets.token_bytes(16),
        grid=peer.membership.grid,
        submitter=peer.identity.public,
        owner=bytes(peer.membership.owner),
        name=str(call.params.get("name") or "session"),
        script="",
        argv=(),
        code=BlobRef(bytes(blob), len(code)),
        python=python_minor(),
        seed=secrets.randbits(63),
        created_s=time.time(),
        owner_name=peer.owner_name,
    )
    signed = sign_spec(spec, peer.identity, peer.membership.chain)
    stream = await call.takeover({})

    def make(job: JobId) -> LeadJob:
        lead = AttachedJob(job, spec, peer.services, peer.reach)
        lead.stream = stream
        return lead

    lead = await peer.lead_alone(spec, signed, pins, make)
    while lead.view.outcome is None:
        await lead.view.bell.wait()
    return {}
