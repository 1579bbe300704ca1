"""A peer: the composition root. It builds every part, wires them, and runs them in one nursery.

Rules: parts know each other only through what is handed to them here; when `serve` returns, every task, process and socket
of the peer is gone.
"""

from __future__ import annotations

import functools
import getpass
import logging
import os
import random
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

import grid
from dht import grants
from dht.contact import Contact
from dht.core import codec
from dht.core.identity import PeerId
from dht.core.membership import Membership, Role
from dht.network import Address, Network, RealNetwork
from dht.node import Node
from grid.admission import Admission
from grid.api.client import ControlError
from grid.blobs.fetch import Fetcher
from grid.blobs.store import BlobStore
from grid.config import ConfigError, Home, JoinOptions, format_address, parse_address
from grid.core import choice, limits
from grid.core.board import Board
from grid.core.errors import RefusedError
from grid.core.job import FINAL, BlobRef, JobId, JobSpec, SignedSpec, job_id, open_spec
from grid.core.messages import JobNews, Keep, Message, decode, encode
from grid.core.news import sign_news
from grid.dispatch import Dispatch
from grid.enrolment import enrol, identity_of, save
from grid.gossip import Gossip
from grid.handlers import Handlers
from grid.helping import Helping
from grid.jobplace import JobPlace, Services
from grid.jobs import Jobs
from grid.keeping import KEPT_SHARE, Custodian, Keeper, owner_of
from grid.leading import Leading
from grid.leadjob import LeadJob
from grid.machine import Machine
from grid.outreach import Outreach
from grid.post import PostOffice
from grid.renewal import Renewal
from grid.replicas import Replicas
from grid.transport.errors import TransportError
from grid.transport.hello import HelloInfo
from grid.transport.mesh import Mesh
from grid.workshop import Workshop

STORE_SHARE = 0.5
"""Of the disk's free space at the start: what blobs may take."""
STORE_BYTES_MIN = 1 << 30
CANDIDATES_ASKED = 2
"""Peers to choose a job's replicas from, for each that is wanted: the oldest of so many."""
CANDIDATES_S = 0.5
"""For connections to them, when a job is submitted before there are enough."""
RESTART_S = 120.0
"""For unfinished jobs' logs to say again which blobs they need."""
BOOTSTRAP_S = 3.0
"""For the first contact's answer, so that a peer said to be ready is in its grid; alone it serves all the same."""
HAND_OVER_S = 10.0
"""For other replicas to take over what is led here when the peer leaves; those who stay elect one of them otherwise."""
LEAVE_S = 5.0
"""For ranges and results to reach their leaders when the peer leaves."""

Report = Callable[[dict[str, Any]], None]
log = logging.getLogger(__name__)


async def serve(options: JoinOptions, report: Report, network: Network | None = None) -> None:
    """Run a peer until cancelled or told to leave. Raises ConfigError, ControlError: it never began then."""
    logging.getLogger("kademlia").setLevel(logging.WARNING)  # it tells each step of each lookup
    home = Home.open(options.home, create=True)
    with home.lock():
        peer = Peer(home, home.settle(options, save=False), report, network or RealNetwork())
        await peer.run()


class Peer:
    """One machine's peer. `run` it once."""

    def __init__(
        self, home: Home, options: JoinOptions, report: Report, network: Network, machine: Machine | None = None
    ) -> None:
        self.machine = machine or Machine()
        self.started_s = self.machine.wall_s()
        self.home = home
        self.options = options
        self.report = report
        self.network = network
        self.rng = random.Random(secrets.randbits(64))
        self.identity = identity_of(home)
        self.me = self.identity.id
        self.board = Board()
        self.stop = trio.CancelScope()
        self.leaving = False
        self.slots = 0 if options.no_work else (options.slots or 1)
        self.address: Address = ("", 0)
        self.membership: Membership
        self.node: Node
        self.mesh: Mesh
        self.jobs: Jobs
        self.helping: Helping
        self.gossip: Gossip
        self.admission: Admission
        self.renewal: Renewal
        self.services: Services
        self.post: PostOffice
        self.leading: Leading
        self.replicas: Replicas
        self.custodian: Custodian
        self.nursery: trio.Nursery
        self._bootstrap: list[Address] = []
        self._versions: dict[JobId, tuple[int, int]] = {}

    # ---- life ----

    async def run(self) -> None:
        """Serve until cancelled or `stop` is."""
        self.membership, self._bootstrap = await enrol(self.home, self.options.invite, self.identity, self.network)
        store = BlobStore(self.home.blobs, _quota(self.home.blobs))
        pool = self.machine.pool(1 if self.slots else 0)
        workshop = Workshop(pool, self.slots, self.options.tags or ())
        with self.stop:
            async with trio.open_nursery() as nursery:
                self.nursery = nursery
                await self._listen(nursery, store)
                fetcher = Fetcher(store, self.mesh.read_blob)
                self.services = Services(
                    self.me,
                    self.options.name or "",
                    self.home.jobs,
                    self.home.envs,
                    store,
                    fetcher,
                    workshop,
                    self.options.memory_bytes or 0,
                )
                await nursery.start(pool.run)
                nursery.start_soon(workshop.watch)
                self._wire(nursery, store)
                await nursery.start(self.replicas.run)
                self.dispatch.ready.set()
                nursery.start_soon(self._end_restart, store)
                nursery.start_soon(self.helping.run)
                nursery.start_soon(self.gossip.run)
                nursery.start_soon(self.renewal.run)
                nursery.start_soon(self._announce)
                await nursery.start(self.machine.control(self.home).serve, Handlers(self).table())
                await self._ready()
                await trio.sleep_forever()

    async def _listen(self, nursery: trio.Nursery, store: BlobStore) -> None:
        """Start the DHT and the mesh on one port number. Raises OSError (port taken) as ConfigError."""
        listen = parse_address(self.options.listen or "")
        dispatch = self.dispatch = Dispatch(self)
        self.mesh = Mesh(
            membership=self.membership,
            network=self.network,
            handler=dispatch,
            locate=self._locate,
            describe=self._describe,
            clock=self.machine.wall_s,
            rng=self.rng,
            entropy=self.machine.entropy,
            in_use=self.needs,
        )
        try:
            self.address = await nursery.start(self.mesh.run, await self._same_port(listen))
            await self._start_node(nursery)
            if listen[1] == 0:
                self.home.remember_port(self.address[1])
        except OSError as error:
            what = format_address(listen)
            raise ConfigError(
                "port-taken",
                f"can't serve at {what}: {error.strerror or error}",
                "choose another port with --listen HOST:PORT (port 0: any that is free)",
            ) from None

    async def _same_port(self, listen: Address) -> Address:
        """Where any free port will do, the last one while it is free: when all peers come back, they look there."""
        host, port = listen
        if port != 0 or self.home.last_port == 0:
            return listen
        last = host, self.home.last_port
        try:
            (await self.network.open_datagram(last)).close()
            await (await self.network.listen_stream(last)).aclose()
        except OSError:
            return listen
        return last

    async def _start_node(self, nursery: trio.Nursery) -> None:
        advertise = parse_address(self.options.advertise) if self.options.advertise else None
        self.node = self.machine.node(
            membership=self.membership,
            network=self.network,
            address=self.address,
            advertise=advertise,
            rng=self.rng,
            clock=self.machine.wall_s,
            state_path=self.home.contacts,
            info=self.info,
        )
        grants.register(self.node)
        await nursery.start(functools.partial(self.node.run, bootstrap=self._bootstrap))

    def _wire(self, nursery: trio.Nursery, store: BlobStore) -> None:
        self.post = PostOffice(self.mesh, nursery, self.lost)
        self.jobs = Jobs(self.home.jobs, self.me, self.board, self.mesh, store.unpin)
        self.jobs.load()
        for archived in self.jobs.archived.values():
            for file in archived.view.outcome.files if archived.view.outcome else ():
                store.pin(f"outcome:{archived.job.hex()}", file.blob.id)  # type: ignore[arg-type]
        self.helping = Helping(
            self.services,
            self.identity,
            self.board,
            self.mesh,
            self.post,
            nursery,
            self.rng,
            self.options.tags or (),
            lambda job: job in self.jobs.led,
        )
        assert self.services.fetcher is not None
        kept_bytes = int(KEPT_SHARE * _quota(self.home.blobs))
        self.custodian = Custodian(self.me, store, self.services.fetcher, self.post.post, kept_bytes)
        self.leading = Leading(self)
        self.replicas = Replicas(
            self.home.jobs,
            self.identity,
            self.mesh,
            self.rng,
            self.machine.journal_disk(),
            self.leading,
            check=lambda signed: open_spec(signed, lambda chain: self.membership.check(chain, time.time()), self.membership.grid),
            knowledge=self.leading,
            wall=self.machine.wall_s,
            entropy=self.machine.entropy,
            at=self.machine.at,
        )
        self.jobs.why_leaderless = self.replicas.waiting
        self.gossip = Gossip(
            self.me,
            self.membership.grid,
            self.board,
            self.node,
            self.mesh,
            self.post,
            lambda chain: self.membership.check(chain, time.time()),
            self.rng,
            self.leading.heard,
        )
        self.renewal = Renewal(
            self.membership,
            self.mesh,
            self.home.path / "root",
            lambda: save(self.home, self.membership, self._bootstrap),
            self.rng,
        )
        self.admission = Admission(self.membership, self.node, self.addresses, self._invite_used)

    async def _end_restart(self, store: BlobStore) -> None:
        """Blobs that the store found at the start are nobody's any more, but for what the jobs that go on have named since."""
        await trio.sleep(RESTART_S)
        store.unpin("restart")

    async def _ready(self) -> None:
        with trio.move_on_after(BOOTSTRAP_S):
            await self.node.ready.wait()
        invite = ""
        with trio.move_on_after(limits.CONTROL_TIMEOUT_S):
            try:
                invite = await self.admission.invite("member", 1, 86_400, False)
            except ControlError as error:
                log.info("no invite: %s", error)
        self.report(
            {
                "schema": 1,
                "event": "ready",
                "grid": self.membership.grid.hex(),
                "peer": self.me.hex(),
                "address": self.addresses()[0],
                "invite": invite,
            }
        )

    def _invite_used(self) -> None:
        self.nursery.start_soon(self._fresh_invite)

    async def _fresh_invite(self) -> None:
        try:
            self.report({"event": "invite", "invite": await self.admission.invite("member", 1, 86_400, False)})
        except ControlError as error:
            log.info("no invite: %s", error)

    async def leave(self, note: Callable[[str], Any], forget: bool) -> None:
        """Hand over what is led here, stop taking work, let what runs reach its leaders; then stop."""
        self.leaving = True
        await self._hand_over(note)
        workshop = self.services.workshop
        workshop.draining = True
        busy = len(self.helping.jobs)
        if busy:
            await note(f"handing back work of {busy} job{'s' * (busy != 1)}")
            with trio.move_on_after(LEAVE_S):
                for helper in list(self.helping.jobs.values()):
                    if helper.remote is not None:
                        await helper.remote.settled()
        for job in list(self.helping.jobs):
            self.helping.over(job)
        if forget:
            for path in (self.home.membership, self.home.contacts, self.home.path / "root"):
                path.unlink(missing_ok=True)

    async def _hand_over(self, note: Callable[[str], Any]) -> None:
        """Have other replicas lead the jobs that are led here."""
        with trio.move_on_after(HAND_OVER_S):
            for lead in list(self.jobs.led.values()):
                if lead.replica is not None and len(lead.replica.voters) > 1 and lead.view.state not in FINAL:
                    await note(f"handing over job {lead.job.hex()[:8]}")
            self.replicas.hand_over()
            await self.leading.given_up()

    # ---- what the parts ask ----

    def addresses(self) -> list[str]:
        """Where this peer can be reached, best first, then other members' addresses."""
        own = [self.options.advertise] if self.options.advertise else [format_address(_dialable(self.address))]
        others = [format_address(contact.address) for contact in self.node.contacts() if contact.id != self.me]
        return [*own, *others[:8]]

    def _describe(self) -> HelloInfo:
        address = self.options.advertise or format_address(_dialable(self.address))
        info = choice.hello_info(self.started_s)
        return HelloInfo(address=address, name=self.options.name or "", version=grid.__version__, info=info)

    async def _locate(self, peer: PeerId) -> list[Address]:
        contact = await self.node.locate(peer)
        return [contact.address] if contact is not None else []

    def info(self) -> bytes:
        """What `grid status` shows of this peer, under 1 KiB."""
        workshop = self.services.workshop
        leads = [job for job, lead in self.jobs.led.items() if lead.view.state not in FINAL]
        return codec.encode(
            (
                (self.options.name or "")[:64],
                bytes(self.membership.owner),
                workshop.slots,
                workshop.busy,
                tuple(leads[:8]),
                grid.__version__,
                "leaving" if self.leaving else "alive",
                _user()[:64],
            )
        )

    @property
    def owner_name(self) -> str:
        """Who runs this peer, for people."""
        return _user()[:64]

    def trust(self, text: str) -> list[str]:
        """Remember whose jobs may run here unsandboxed: a peer's id or prefix, or "all". Raises ControlError."""
        if text != "all":
            found = [c.id.hex() for c in self.node.contacts() if c.id.hex().startswith(text.lower())]
            if len(found) != 1 and len(text) != 40:
                what = "may be several peers" if found else "is no peer known here"
                raise ControlError("unknown-peer", f"{text!r} {what}", "list peers with: grid status")
            text = found[0] if found else text.lower()
        trusted = tuple(sorted({*(self.options.trust or ()), text}))
        self.options = self.home.settle(replace(self.options, trust=trusted))
        return list(trusted)

    async def candidates(self, count: int) -> list[PeerId]:
        """Peers to hold a job submitted here, this one first. Connects to some when too few are connected."""
        connected = set(self.mesh.connected())
        others = [contact for contact in self.node.contacts() if contact.id != self.me and contact.id not in connected]
        missing = min(len(others), CANDIDATES_ASKED * count - len(connected))
        if missing > 0:

            async def connect(contact: Contact) -> None:
                with suppress(TransportError):
                    await self.mesh.connect(contact.id, [contact.address])

            with trio.move_on_after(CANDIDATES_S):
                async with trio.open_nursery() as nursery:
                    for contact in self.rng.sample(others, missing):
                        nursery.start_soon(connect, contact)
        return self.replicas.choose(count)

    def check_cancel(self, job: JobId, by: PeerId, force: bool) -> None:
        """Raises ControlError unless the member may cancel this job led here."""
        lead = self.jobs.led.get(job)
        if lead is None:
            return
        certificate = self.membership.certificate
        if by != self.me:
            hello = self.mesh.hello(by)
            if hello is None:
                raise ControlError("refused", "who asks is not connected")
            certificate = hello.chain[-1]
        if bytes(certificate.owner) == lead.spec.owner:
            return
        if not (force and certificate.roles & Role.ADMIN):
            owner = lead.spec.owner_name or lead.spec.owner.hex()[:8]
            hint = f"an admin may cancel it with: grid cancel --force {lead.job.hex()[:8]}"
            raise ControlError("not-owner", f"the job is {owner}'s", hint)

    def found(self, peer: PeerId) -> None:
        """A connection to a peer stands."""
        self.replicas.up(peer)
        for lead in self.jobs.led.values():
            if lead.keeper is not None:
                lead.keeper.up(peer)

    def lost(self, peer: PeerId) -> None:
        """A peer can't be reached: its connection ended, or it does not take its messages."""
        self.replicas.down(peer)
        for lead in self.jobs.led.values():
            if lead.outreach is not None:
                lead.outreach.lost(peer)
            if lead.keeper is not None:
                lead.keeper.down(peer)

    def needs(self, peer: PeerId) -> bool:
        """Whether a connection to it is needed although nothing may come over it for a while: one end leads what the other helps,
        or both hold replicas of a job.
        """
        if not self.dispatch.ready.is_set() or any(lead.view.outcome is None for lead in self.jobs.led.values()):
            return True
        helped = any(helper.leader == peer for helper in self.helping.jobs.values())
        return helped or any(peer in replica.members for replica in self.replicas.all())

    # ---- jobs led here ----

    def check_submit(self) -> None:
        """Raises ControlError unless this member may submit jobs."""
        if not self.membership.roles & Role.SUBMIT:
            hint = "join with an invite of another role: grid invite --role member"
            raise ControlError("role", "this machine's membership doesn't let it submit jobs", hint)

    async def lead(self, spec: JobSpec, signed: SignedSpec, pins: str, blobs: Sequence[BlobRef]) -> JobId:
        """Accept a job: its log is on a majority's disks, it is announced and led here when this returns.

        pins: the owner of `blobs`, all that the job needs, in the store; the job owns them afterwards, or nobody when it was
        not accepted. Raises ControlError, OSError.
        """
        job = job_id(signed.payload)
        try:
            self.check_submit()
            for ref in blobs:
                self.services.store.pin(owner_of(job), ref.id)  # type: ignore[arg-type]
            return await self.leading.found(spec, signed, blobs)
        except BaseException:
            self.services.store.unpin(owner_of(job))
            raise
        finally:
            self.services.store.unpin(pins)

    async def lead_alone(self, spec: JobSpec, signed: SignedSpec, pins: str, make: Callable[[JobId], LeadJob]) -> LeadJob:
        """Accept a job whose driver is a process of this machine: it ends with this peer. Raises ControlError, OSError.

        pins: the owner of the job's blobs in the store, let go when the job is over or was not accepted.
        """
        job = job_id(signed.payload)
        try:
            self.check_submit()
            lead = make(job)
            self.jobs.begin(job, lead, signed)
        except (ControlError, OSError):
            self.services.store.unpin(pins)
            raise
        lead.news = lambda: self._tell(job, lead, signed)
        self._tell(job, lead, signed)
        self.nursery.start_soon(self._lead, lead, pins)
        return lead

    async def _lead(self, lead: LeadJob, pins: str) -> None:
        try:
            await lead.run()
        finally:
            self.services.store.unpin(pins)
            if lead.view.outcome is not None:
                self.jobs.ended(lead)

    def reach(self, lead: LeadJob, place: JobPlace, nursery: trio.Nursery) -> Outreach:
        """A leader's way to other peers."""
        assert lead.leader is not None

        async def request(peer: PeerId, message: Message, timeout_s: float) -> Message:
            return decode(await self.mesh.request(peer, encode(message), timeout_s))

        may_lead = lead.replica.leads if lead.replica is not None else (lambda: True)
        return Outreach(lead.leader, place.data, self.identity, lead.epoch, self.post, nursery, request, may_lead)

    def keeper(self, lead: LeadJob) -> Keeper:
        """Who sees to copies of a job's blobs, where it is led."""
        assert lead.replica is not None
        return Keeper(
            lead.job,
            self.me,
            self.custodian,
            self.post.post,
            self.mesh.connected(),
            lead.replica.voters,
            self.mesh.read_blob,
            max(1, min(lead.spec.options.replicas, len(lead.replica.voters))),
            lead.copies_lost,
        )

    def keep(self, peer: PeerId, message: Keep) -> None:
        """A job's leader wants blobs kept here. Raises RefusedError."""
        replica = self.replicas.get(JobId(message.job))
        entry = self.board.get(JobId(message.job))
        if peer not in (replica.leader if replica is not None else None, entry.leader if entry is not None else None):
            raise RefusedError("only a job's leader may say what is to be kept")
        self.nursery.start_soon(self.custodian.answer_keep, peer, message)

    def version_of(self, job: JobId, epoch: int) -> int:
        """The next version of the news that this peer tells of the job in this epoch."""
        known_epoch, version = self._versions.get(job, (0, 0))
        self._versions[job] = (epoch, version + 1 if known_epoch == epoch else 1)
        return self._versions[job][1]

    def _tell(self, job: JobId, lead: LeadJob, signed: SignedSpec) -> None:
        version = self.version_of(job, lead.epoch)
        work = lead.place is not None and bool(lead.place.site.deque)
        address = parse_address(self.addresses()[0])
        news = JobNews(signed, lead.epoch, self.me, address, version, lead.view.state, work)
        self.gossip.tell(sign_news(news, self.identity))
        if lead.view.state in FINAL:
            self._versions.pop(job, None)

    async def _announce(self) -> None:
        """Repeat the news of jobs led here, let go of what is kept for jobs nobody knows, and of blobs while the disk is full."""
        while True:
            await trio.sleep(limits.ANNOUNCE_S)
            with suppress(OSError):
                self.services.store.leave_free(limits.FREE_BYTES_MIN)
            for lead in list(self.jobs.led.values()):
                lead.news()
            for job in self.custodian.jobs():
                if self.board.get(job) is None and self.replicas.get(job) is None:
                    self.custodian.release(job, final=False)


def _dialable(address: Address) -> Address:
    """An address others can dial, where we listen on all of them."""
    host, port = address
    if host not in ("0.0.0.0", "::"):
        return address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it only chooses the interface (TEST-NET-1, RFC 5737)
            return probe.getsockname()[0], port
        except OSError:
            return "127.0.0.1", port


def _quota(folder: Path) -> int:
    return max(STORE_BYTES_MIN, int(shutil.disk_usage(folder).free * STORE_SHARE))


def _user() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname().split('.')[0]}"
