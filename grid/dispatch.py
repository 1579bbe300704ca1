"""Where messages from other peers go: decoded once, judged by their session, handed to the job they name.

Rules: what breaks a rule is counted and dropped, it never ends the connection of an honest peer that is merely late (a job
that ended here, an epoch that is over); nothing is handled before the peer is wired.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import trio

from dht.core import codec
from dht.core.codec import CodecError
from dht.core.identity import BadSignature, PeerId
from dht.core.membership import Chain, MembershipError
from grid.api.client import ControlError
from grid.core.errors import GridError, RefusedError
from grid.core.job import JobId
from grid.core.messages import (
    Accepted,
    Answer,
    Ask,
    Beat,
    Claims,
    Completed,
    Dismissed,
    Drop,
    Endorse,
    Enlist,
    FindBlob,
    GrantTaken,
    Have,
    Holders,
    JobNews,
    JobsWanted,
    Keep,
    Mail,
    Nothing,
    Poke,
    Printed,
    Relay,
    RelayClosed,
    Renew,
    Steal,
    Survey,
    decode,
    encode,
)
from grid.transport.errors import RemoteError
from grid.transport.hello import Hello

if TYPE_CHECKING:
    from grid.peer import Peer

BAD = (RefusedError, BadSignature, CodecError, MembershipError, GridError)
log = logging.getLogger(__name__)


class Dispatch:
    """The mesh's handler."""

    def __init__(self, peer: Peer) -> None:
        self.ready = trio.Event()
        self.counters: Counter[str] = Counter()
        self._peer = peer

    # ---- connections ----

    async def on_up(self, peer: PeerId, hello: Hello) -> None:
        """See MeshHandler."""
        await self.ready.wait()
        self._peer.gossip.up(peer)
        self._peer.helping.up(peer)
        self._peer.found(peer)

    async def on_down(self, peer: PeerId, why: str) -> None:
        """See MeshHandler."""
        await self.ready.wait()
        log.debug("connection to %s ended: %s", peer.hex()[:8], why)
        self._peer.helping.down(peer)
        self._peer.lost(peer)

    async def admit(self, invite: bytes, key: bytes, hello: Hello) -> Chain:
        """See MeshHandler."""
        await self.ready.wait()
        return await self._peer.admission.admit(invite, key)

    async def read_blob(self, peer: PeerId, blob: bytes, offset: int, length: int) -> bytes | None:
        """See MeshHandler."""
        await self.ready.wait()
        return await self._peer.services.store.serve(blob, offset, length)

    # ---- messages ----

    async def on_message(self, peer: PeerId, message: bytes) -> None:
        """See MeshHandler."""
        await self.ready.wait()
        try:
            await self._message(peer, decode(message))
        except BAD as error:
            self.counters[type(error).__name__] += 1
            log.debug("a message of %s was dropped: %s", peer.hex()[:8], error)

    async def _message(self, peer: PeerId, message: Any) -> None:
        match message:
            case JobNews():
                self._peer.gossip.hear(message, peer)
            case JobsWanted():
                self._peer.gossip.wanted(peer)
            case Poke(job=job):
                self._peer.helping.poked(JobId(job), peer)
            case Mail() | Dismissed():
                await self._peer.replicas.handle(peer, message)
            case Keep():
                self._peer.keep(peer, message)
            case Claims() | Completed() | Printed() | Have() | Relay() | RelayClosed() | GrantTaken():
                await self._about_job(peer, message)
            case Accepted() | Drop() | Beat():
                await self._about_job(peer, message)
            case _:
                raise RefusedError(f"{type(message).__name__} is no message of its own")

    async def _about_job(self, peer: PeerId, message: Any) -> None:
        job = JobId(self._job_of(message))
        lead = self._peer.jobs.led.get(job)
        if lead is not None:
            if isinstance(message, Have) and lead.keeper is not None:
                lead.keeper.have(peer, message.blobs, message.refused, message.sizes)
            if lead.outreach is not None:
                await lead.outreach.handle(peer, message)
            else:
                lead.hold(peer, message)
            return
        helper = self._peer.helping.jobs.get(job)
        if isinstance(message, Drop):
            self._peer.helping.dropped(peer, message)
        if helper is not None and helper.remote is not None:
            await helper.remote.handle(peer, message)
        elif isinstance(message, Claims | Completed) and job in self._peer.jobs.archived:
            entry = self._peer.board.get(job)
            if entry is not None:
                self._peer.post.post(peer, entry.news)  # it has not heard that the job is over

    def _job_of(self, message: Any) -> bytes:
        if isinstance(message, Completed):
            from grid.core.bundle import Completion

            return codec.decode(message.signed.payload, Completion).job
        return bytes(message.job)

    # ---- requests ----

    async def on_request(self, peer: PeerId, message: bytes) -> bytes:
        """See MeshHandler."""
        await self.ready.wait()
        try:
            return encode(await self._request(peer, decode(message)))
        except ControlError as error:
            raise RemoteError(error.code, f"{error.message}\n{error.hint}") from None
        except BAD as error:
            self.counters[type(error).__name__] += 1
            raise RemoteError(getattr(error, "code", "refused"), str(error)) from None

    async def _request(self, peer: PeerId, message: Any) -> Any:
        match message:
            case Steal(job=job):
                return await self._steal(peer, JobId(job), message)
            case FindBlob(job=job, blob=blob):
                lead = self._peer.jobs.led.get(JobId(job))
                return Holders(tuple(await lead.find(blob) if lead is not None else ()))
            case Enlist() | Survey() | Endorse():
                return await self._peer.replicas.request(peer, message)
            case Ask(method=method, params=params):
                return await self._ask(peer, method, json.loads(params))
            case Renew():
                return self._peer.renewal.answer(peer)
            case _:
                raise RefusedError(f"{type(message).__name__} is no request")

    async def _steal(self, peer: PeerId, job: JobId, message: Steal) -> Any:
        lead = self._peer.jobs.led.get(job)
        if lead is not None and lead.outreach is not None:
            return await lead.outreach.steal(peer, message)
        helper = self._peer.helping.jobs.get(job)
        if helper is not None and helper.remote is not None and helper.ready.is_set():
            return await helper.remote.steal(peer, message)
        return Nothing(state="final" if job in self._peer.jobs.archived else "")

    async def _ask(self, peer: PeerId, method: str, params: dict[str, Any]) -> Answer:
        if method == "jobs":
            return Answer(json.dumps(list(self._peer.jobs.known().values())).encode())
        if method == "cancel":
            self._peer.check_cancel(JobId(bytes.fromhex(params["job"])), peer, bool(params.get("force")))
        result, body = await self._peer.jobs.answer(JobId(bytes.fromhex(params["job"])), method, params)
        return Answer(json.dumps(result).encode(), body)
