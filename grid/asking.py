"""How a peer learns of a job from whoever leads or keeps it, and goes on asking when that one goes away.

A question goes to this peer's own leadership or archive, else to the leader that the news name. Rules:
- who can't be reached, or doesn't lead any more, is not an error yet: newer news are waited for, and the question is put again;
- meanwhile (and for a job that ended) replicas may answer, this peer's own first: what they say is committed;
- a wait ends when the news change, and at the latest after GIVE_UP_S without any answer, with an error that says so; where
  this peer holds a replica itself a poll never gives up: the job lives here.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import trio

from dht.core import codec
from dht.core.identity import PeerId
from grid.api.client import ControlError
from grid.bell import Bell
from grid.core import limits
from grid.core.board import Board, Entry
from grid.core.job import FINAL, JobId
from grid.core.messages import Answer, Ask, JobsWanted, decode, encode
from grid.transport.errors import RemoteError, TransportError

if TYPE_CHECKING:
    from grid.jobs import Jobs
    from grid.transport.mesh import Mesh

RECOVERY_S: Final = 6.0
"""Replicas that lost their majority go on after this time."""
GIVE_UP_S: Final = limits.JOB_FORGET_S + RECOVERY_S
"""Without any answer: a leader that lives would have been heard of, and one that comes would have come."""
RETRY_S: Final = 1.0
"""Between attempts while no news come."""
RETRY_LEADER_S: Final = 5.0
"""Before a leader that could not be reached is asked again: dialling it takes its time."""
KEEPERS_ASKED: Final = 8
"""Peers asked at once for a job whose leader does not answer: more than it has replicas, as a rule."""
KEEPER_POLL_S: Final = 2.0
"""A long poll at a replica is this short: the next may go to a new leader."""
STARTED_S: Final = 5.0
"""After its start a peer may not have heard of a job yet that others know."""
ELSEWHERE: Final = frozenset(
    {"not-leader", "unknown-job", "unknown_job", "not-here", "fenced", "leader-unreachable", "internal", "busy", "shutting-down"}
)
"""Codes of answers that say no more than: ask another peer."""

Reply: TypeAlias = tuple[Any, bytes]


class Asking:
    """All questions of one peer."""

    def __init__(self, jobs: Jobs, board: Board, mesh: Mesh | None) -> None:
        self._jobs = jobs
        self._board = board
        self._mesh = mesh
        self._bell = Bell()
        self._began_s = trio.current_time()
        board.listeners.append(lambda job: self._bell.ring())

    def keepers(self, job: JobId) -> list[PeerId]:
        """Who most likely has something of the job, this peer apart: its leader and replicas, then whoever is connected."""
        entry = self._board.get(job)
        followed = self._jobs.followed.get(job)
        voters = followed.replica.voters if followed is not None and followed.replica is not None else ()
        connected = self._mesh.connected() if self._mesh is not None else []
        found = dict.fromkeys((*voters, *(entry.keepers if entry is not None else ()), *connected))
        return [PeerId(peer) for peer in found if peer != self._jobs.me]

    async def ask(self, job: JobId, method: str, params: dict[str, Any], check: Callable[[], None]) -> Reply:
        """See `Jobs.ask`."""
        return await _Question(self, self._jobs, self._board, job, method, params, check).put()

    def forgetful(self) -> bool:
        """This peer was started only just now: news may still be on their way."""
        return trio.current_time() - self._began_s < STARTED_S

    async def request(self, peer: PeerId, job: JobId, method: str, params: dict[str, Any]) -> Reply:
        """Ask another peer. Raises ControlError."""
        if self._mesh is None:
            raise ControlError("unknown-job", f"no job {job.hex()[:12]} is known here", "list jobs with: grid jobs")
        wait_s = float(params.get("wait_s", 0.0)) + limits.CONTROL_TIMEOUT_S
        question = encode(Ask(method, json.dumps({**params, "job": job.hex()}).encode()))
        try:
            answer = decode(await self._mesh.request(peer, question, wait_s))
        except RemoteError as error:
            message, _, hint = str(error).partition("\n")
            raise ControlError(error.code, message, hint) from None
        except (TransportError, codec.CodecError, trio.TooSlowError) as error:
            text = f"peer {peer.hex()[:8]} can't be reached: {error}"
            raise ControlError("leader-unreachable", text, "") from None
        if not isinstance(answer, Answer):
            raise ControlError("leader-unreachable", f"peer {peer.hex()[:8]} gave no answer")
        return json.loads(answer.result), answer.body

    async def news_of(self, peer: PeerId) -> None:
        """A peer knows better than our news: have it tell."""
        if self._mesh is not None:
            with suppress(TransportError):
                await self._mesh.send(peer, encode(JobsWanted()))

    async def change(self) -> None:
        """Return when news of some job were taken."""
        await self._bell.wait()


class _Question:
    """One question until its answer."""

    def __init__(
        self,
        asking: Asking,
        jobs: Jobs,
        board: Board,
        job: JobId,
        method: str,
        params: dict[str, Any],
        check: Callable[[], None],
    ) -> None:
        self._asking, self._jobs, self._board = asking, jobs, board
        self._job, self._method, self._params, self._check = job, method, params, check
        self._until_s = trio.current_time() + min(float(params.get("wait_s", 0.0)), limits.POLL_S_MAX)
        self._unreached: dict[tuple[Any, ...], float] = {}  # leaderships that did not answer, and when
        self._error = ControlError("unknown-job", f"no job {job.hex()[:12]} is known here", "list jobs with: grid jobs")

    async def put(self) -> Reply:
        """Put it until it is answered. Raises ControlError."""
        began_s: float | None = None
        while True:
            known = self._standing()
            answer = await self._anywhere()
            if answer is not None:
                return answer
            if self._standing() != known:
                continue
            now_s = trio.current_time()
            began_s = now_s if began_s is None else began_s
            self._check_patience(now_s - began_s)
            with trio.move_on_after(RETRY_S):
                await self._asking.change()

    def _check_patience(self, waited_s: float) -> None:
        """Raises ControlError when nothing is to be hoped for any more."""
        entry = self._board.get(self._job)
        if self._job in self._jobs.followed:
            if waited_s > GIVE_UP_S:
                why = self._jobs.why_leaderless(self._job) or "its replicas can't choose one now"
                raise ControlError("no-leader", f"job {self._job.hex()[:8]} has no leader: {why}", "see: grid explain")
        elif entry is None:
            if not self._asking.forgetful():
                raise self._error
        elif not entry.live or waited_s > GIVE_UP_S:
            name, role = entry.leader.hex()[:8], "leads" if entry.live else "led"
            text = f"peer {name}, which {role} the job, can't be reached, nor a peer that holds it ({self._error.message})"
            raise ControlError("leader-unreachable", text, "if one of their machines comes back, so does the job: try again")

    # ---- places to ask ----

    def _standing(self) -> tuple[Any, ...]:
        """Changes when another place may answer."""
        entry, lead = self._board.get(self._job), self._jobs.led.get(self._job)
        leads = lead is not None and not self._jobs.left(lead)
        followed = self._jobs.followed.get(self._job)
        over = self._job in self._jobs.archived or (followed is not None and followed.view.outcome is not None)
        return (_leadership(entry), entry is None or entry.live, leads, over)

    async def _anywhere(self) -> Reply | None:
        """One round; it ends early when there is a better place to ask than those that are left."""
        known = self._standing()
        places = [self._here, self._leader]
        if self._method != "cancel":
            places += [self._own_replica, self._keepers]
        for place in places:
            answer = await place()
            if answer is not None or self._standing() != known:
                return answer
        return None

    async def _here(self) -> Reply | None:
        """This peer leads the job, or keeps its outcome."""
        _, _, leads, over = self._standing()
        if not leads and not over:
            return None
        if leads:
            self._check()
        return await self._attempt(lambda: self._jobs.answer(self._job, self._method, self._now()))

    async def _leader(self) -> Reply | None:
        """Whom the news name."""
        entry = self._board.get(self._job)
        if entry is None or entry.leader == self._jobs.me:
            return None
        leadership = _leadership(entry)
        if trio.current_time() - self._unreached.get(leadership, -RETRY_LEADER_S) < RETRY_LEADER_S:
            return None
        leader = entry.leader
        known = self._standing()
        answer = await self._attempt(lambda: self._asking.request(leader, self._job, self._method, self._now()))
        if answer is None and self._standing() == known:
            self._unreached[leadership] = trio.current_time()
            if self._error.code == "not-leader":
                await self._asking.news_of(leader)
        return answer

    async def _own_replica(self) -> Reply | None:
        if self._job not in self._jobs.followed:
            return None
        params = {**self._now(), "replica": True}
        params["wait_s"] = min(params.get("wait_s", 0.0), RETRY_S)
        answer = await self._attempt(lambda: self._jobs.answer(self._job, self._method, params))
        return answer if answer is not None and self._useful(answer) else None

    async def _keepers(self) -> Reply | None:
        """Other peers that may hold a replica or the outcome; the first that has something to say."""
        waits_here = self._method == "poll" and self._job in self._jobs.followed and self._error.code != "not-here"
        keepers = self._asking.keepers(self._job)[:KEEPERS_ASKED]
        if waits_here or not keepers:
            return None
        params = {**self._now(), "replica": True}
        params["wait_s"] = min(params.get("wait_s", 0.0), KEEPER_POLL_S)
        found: list[Reply] = []
        refused: list[ControlError] = []

        async def ask_all() -> Reply | None:
            async with trio.open_nursery() as nursery:

                async def ask(peer: PeerId) -> None:
                    try:
                        answer = await self._asking.request(peer, self._job, self._method, params)
                    except ControlError as error:
                        self._note(error)
                        if error.code not in ELSEWHERE:
                            refused.append(error)
                            nursery.cancel_scope.cancel()
                        return
                    if self._useful(answer):
                        found.append(answer)
                        nursery.cancel_scope.cancel()

                for peer in keepers:
                    nursery.start_soon(ask, peer)
            if refused and not found:
                raise refused[0]
            return found[0] if found else None

        return await self._attempt(ask_all)

    # ---- one attempt ----

    async def _attempt(self, ask: Callable[[], Awaitable[Reply | None]]) -> Reply | None:
        """None: not there (any more); another place may know. Raises ControlError that no other peer would answer otherwise."""
        known = self._standing()
        answers: list[Reply | None] = []
        error: ControlError | None = None
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                while self._standing() == known:
                    with trio.move_on_after(RETRY_S):
                        await self._asking.change()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            try:
                answers.append(await ask())
            except ControlError as caught:
                error = caught
            nursery.cancel_scope.cancel()
        if error is not None:
            self._note(error)
            if error.code not in ELSEWHERE:
                raise error
        return answers[0] if answers else None

    def _note(self, error: ControlError) -> None:
        """Keep the error that says most."""
        if error.code != "unknown-job" or self._error.code == "unknown-job":
            self._error = error

    def _now(self) -> dict[str, Any]:
        """The parameters, with what is left of the time to wait."""
        if "wait_s" not in self._params:
            return dict(self._params)
        return {**self._params, "wait_s": max(0.0, self._until_s - trio.current_time())}

    def _useful(self, answer: Reply) -> bool:
        """Of a replica: it says something new, or there is no time left to wait for more."""
        if self._method != "poll":
            return True
        return bool(answer[1]) or answer[0]["state"] in FINAL or trio.current_time() >= self._until_s


def _leadership(entry: Entry | None) -> tuple[Any, ...]:
    return () if entry is None else (entry.leader, entry.news.branch.name, entry.news.epoch)
