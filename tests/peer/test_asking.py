"""Questions about a job find whoever leads or keeps it, and follow it when that one goes: several registries, one fake mesh."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from dht.core.identity import PeerId
from grid.api.client import ControlError
from grid.asking import GIVE_UP_S, RETRY_S
from grid.core import limits
from grid.core.board import Board
from grid.core.bundle import StageOptions
from grid.core.chronicle import Chronicle
from grid.core.facts import Output, StageOpened
from grid.core.job import CANCELLED, FINISHED, RUNNING, JobId, Outcome, job_id
from grid.core.mandate import Branch, Mandate
from grid.core.messages import Answer, Ask, JobNews, JobsWanted, decode, encode
from grid.describing import describe
from grid.jobs import Jobs
from grid.jobview import JobView
from grid.transport.errors import PeerUnreachable, RemoteError
from tests.core.material import LEADER, signed_spec, spec

SPEC, SIGNED = spec(), signed_spec()
JOB = job_id(SIGNED.payload)
IDS = [PeerId(bytes([65 + n]) * 20) for n in range(4)]
DONE = Outcome(FINISHED, 0)
Clock = trio.testing.MockClock


class Lead:
    """A leadership as the registry sees it."""

    def __init__(self, peer: Peer, epoch: int) -> None:
        self.job, self.spec, self.epoch = JOB, SPEC, epoch
        self.view = peer.jobs.followed[JOB].view if JOB in peer.jobs.followed else JobView(peer.folder)
        self.view.state = RUNNING
        self.leader = object()
        self.abandoned = False
        self.replica = SimpleNamespace(branch=Branch(), voters=(peer.id,))
        self.cancelled = trio.Event()
        self._peer = peer

    def describe(self) -> dict[str, Any]:
        stages = [{"index": 0, "name": "f", "total": 9, "open": False, "done": 3, "failed": 0}]
        return describe(JOB, SPEC, self.view, self.epoch, self._peer.id, stages, {}, IDS[:3])

    def end(self, state: str, exit_code: int | None, why: str) -> None:
        self.cancelled.set()


class Peer:
    """One registry."""

    def __init__(self, world: World, me: PeerId, folder: Path) -> None:
        self.id, self.folder = me, folder / JOB.hex()
        self.folder.mkdir(parents=True)
        self.board = Board()
        self.jobs = Jobs(folder, me, self.board, cast(Any, Mesh(world, me)), lambda owner: None)
        self.gone = trio.Event()

    def heard(self, leader: PeerId, epoch: int, version: int = 1, state: str = RUNNING) -> None:
        voters = tuple(IDS[:3])
        news = JobNews(SIGNED, epoch, leader, ("", 0), version, state, True, mandate=Mandate(voters))
        self.board.hear(JOB, SPEC, news, trio.current_time())

    def lead(self, epoch: int) -> Lead:
        lead = Lead(self, epoch)
        self.jobs.led[JOB] = cast(Any, lead)
        return lead

    def follow(self) -> Any:
        followed = self.jobs.follow(JOB, SIGNED, SPEC, self.folder)
        followed.replica = cast(
            Any, SimpleNamespace(chronicle=Chronicle(), term=1, leader=None, voters=tuple(IDS[:3]), branch=Branch(), empty=False)
        )
        return followed

    def resign(self) -> None:
        cast(Any, self.jobs.led[JOB]).abandoned = True
        self.jobs.led.pop(JOB).view.bell.ring()

    async def ask(self, method: str = "show", **params: Any) -> Any:
        return await self.jobs.ask(JOB, method, params)

    async def poll(self, stdout: int = 0, wait_s: float = 0.0) -> tuple[dict[str, Any], bytes]:
        params = {"stdout": stdout, "stderr": -1, "print": 0, "seen": 0, "wait_s": wait_s}
        answer, body = await self.jobs.ask(JOB, "poll", params)
        return answer, body


class World:
    """All peers, and who was asked what."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[tuple[PeerId, str]] = []
        self.wanted: list[PeerId] = []
        self.peers: dict[PeerId, Peer] = {}
        for number, me in enumerate(IDS):
            self.peers[me] = Peer(self, me, folder / str(number))

    def kill(self, peer: Peer) -> None:
        peer.gone.set()

    def tell(self, leader: Peer, epoch: int, version: int = 1, state: str = RUNNING) -> None:
        """Everybody hears it."""
        for peer in self.peers.values():
            peer.heard(leader.id, epoch, version, state)


class Mesh:
    """Requests go straight to the other registry, as `grid.dispatch` hands them on; the dead don't answer."""

    def __init__(self, world: World, me: PeerId) -> None:
        self._world, self._me = world, me

    def connected(self) -> list[PeerId]:
        return [peer.id for peer in self._world.peers.values() if peer.id != self._me and not peer.gone.is_set()]

    async def send(self, peer: PeerId, message: bytes) -> None:
        assert decode(message) == JobsWanted()
        self._world.wanted.append(peer)

    async def request(self, peer: PeerId, message: bytes, timeout_s: float) -> bytes:
        question = decode(message)
        assert isinstance(question, Ask)
        params = json.loads(question.params)
        self._world.asked.append((peer, question.method))
        if peer not in self._world.peers:
            raise PeerUnreachable(peer, "unknown")
        other = self._world.peers[peer]
        found: list[bytes] = []
        with trio.fail_after(timeout_s):
            async with trio.open_nursery() as nursery:

                async def watch() -> None:
                    await other.gone.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(watch)
                await trio.sleep(0.001)
                try:
                    result, body = await other.jobs.answer(JobId(bytes.fromhex(params["job"])), question.method, params)
                    found.append(encode(Answer(json.dumps(result).encode(), body)))
                except ControlError as caught:
                    error = RemoteError(caught.code, f"{caught.message}\n{caught.hint}")
                nursery.cancel_scope.cancel()
        if other.gone.is_set():
            raise PeerUnreachable(peer, "connection refused")
        if not found:
            raise error
        return found[0]


@pytest.fixture
async def world(tmp_path: Path, autojump_clock: Clock) -> World:
    made = World(tmp_path)
    await trio.sleep(60.0)  # nobody was started only just now
    return made


@pytest.fixture
def peers(world: World) -> list[Peer]:
    return list(world.peers.values())


# ---- while a leader lives ----------------------------------------------------------------------------------------------


async def test_leader_answers_from_anywhere(autojump_clock: Clock, world: World, peers: list[Peer]) -> None:
    peers[0].lead(1)
    world.tell(peers[0], 1)
    for peer in peers:
        shown, _ = await peer.ask()
        assert (shown["leader"], shown["epoch"], shown["state"]) == (IDS[0].hex(), 1, "running")
        assert shown["replicas"] == [peer.hex() for peer in IDS[:3]]
        assert "branch" not in shown


async def test_error_of_the_leader_is_the_answer(autojump_clock: Clock, world: World, peers: list[Peer]) -> None:
    peers[0].lead(1)
    world.tell(peers[0], 1)
    with pytest.raises(ControlError) as caught:
        await peers[1].ask("task_log", stage=0, index=99)
    assert caught.value.code == "unknown-task"


async def test_unknown_job_is_told_at_once_by_who_runs_for_a_while(autojump_clock: Clock, peers: list[Peer]) -> None:
    began_s = trio.current_time()
    with pytest.raises(ControlError) as caught:
        await peers[0].ask()
    assert caught.value.code == "unknown-job"
    assert trio.current_time() - began_s < 1.0


async def test_peer_that_was_just_started_waits_for_the_news(tmp_path: Path, autojump_clock: Clock) -> None:
    world = World(tmp_path)
    first, second, *_ = world.peers.values()
    first.lead(1)
    world.peers.clear()  # nobody is connected yet
    async with trio.open_nursery() as nursery:

        async def asks() -> None:
            shown, _ = await second.ask()
            assert shown["state"] == "running"
            nursery.cancel_scope.cancel()

        nursery.start_soon(asks)
        await trio.sleep(1.0)
        world.peers.update({first.id: first, second.id: second})
        second.heard(first.id, 1)
        await trio.sleep(10.0)
        raise AssertionError("no answer")


# ---- leaders that go ---------------------------------------------------------------------------------------------------


async def test_long_poll_goes_over_to_the_new_leader(autojump_clock: Clock, world: World, peers: list[Peer]) -> None:
    first = peers[0].lead(1)
    first.view.write(1, b"one ")
    world.tell(peers[0], 1)
    _, body = await peers[3].poll()
    assert body == b"one "
    async with trio.open_nursery() as nursery:

        async def change() -> None:
            await trio.sleep(2.0)
            world.kill(peers[0])
            await trio.sleep(3.0)
            second = peers[1].lead(2)
            second.view.write(1, b"one two")
            world.tell(peers[1], 2)

        nursery.start_soon(change)
        began_s = trio.current_time()
        answer, body = await peers[3].poll(4, limits.POLL_S_MAX)
    assert (body, answer["leader"]) == (b"two", IDS[1].hex())
    assert 5.0 <= trio.current_time() - began_s < 5.1


async def test_stopped_leader_is_left_when_news_name_another(autojump_clock: Clock, world: World, peers: list[Peer]) -> None:
    """It does not answer, but its connection stands: a long poll of 20 s would wait for it."""
    peers[0].lead(1)
    world.tell(peers[0], 1)
    async with trio.open_nursery() as nursery:

        async def change() -> None:
            await trio.sleep(3.0)
            peers[1].lead(2).view.write(1, b"new")
            world.tell(peers[1], 2)

        nursery.start_soon(change)
        _, body = await peers[3].poll(0, limits.POLL_S_MAX)
    assert body == b"new"


async def test_leader_that_resigned_is_asked_for_news(autojump_clock: Clock, world: World, peers: list[Peer]) -> None:
    peers[0].follow()
    world.tell(peers[0], 1)
    with trio.move_on_after(5.0):
        await peers[3].ask("cancel")
    assert world.wanted == [IDS[0]]


async def test_cancel_waits_for_the_next_leader(autojump_clock: Clock, world: World, peers: list[Peer]) -> None:
    world.tell(peers[0], 1)
    world.kill(peers[0])
    async with trio.open_nursery() as nursery:

        async def change() -> None:
            await trio.sleep(4.0)
            lead = peers[1].lead(2)
            world.tell(peers[1], 2)
            await lead.cancelled.wait()
            await trio.sleep(1.0)
            lead.view.finish(Outcome(CANCELLED, None))

        nursery.start_soon(change)
        answer, _ = await peers[3].ask("cancel")
    assert answer == {"state": CANCELLED}


async def test_cancel_at_a_leader_that_loses_its_epoch_goes_to_the_next(
    autojump_clock: Clock, world: World, peers: list[Peer]
) -> None:
    peers[0].lead(1)
    world.tell(peers[0], 1)
    async with trio.open_nursery() as nursery:

        async def change() -> None:
            await trio.sleep(1.0)
            peers[0].resign()
            lead = peers[1].lead(2)
            lead.view.finish(Outcome(CANCELLED, None))
            world.tell(peers[1], 2)

        nursery.start_soon(change)
        answer, _ = await peers[0].ask("cancel")
    assert answer == {"state": CANCELLED}


async def test_cancel_that_can_not_be_made_final_says_so(autojump_clock: Clock, world: World, peers: list[Peer]) -> None:
    peers[0].lead(1)
    world.tell(peers[0], 1)
    with pytest.raises(ControlError) as caught:
        await peers[3].ask("cancel")
    assert caught.value.code == "not-final"


async def test_right_to_cancel_is_checked_where_the_job_is_led_here(
    autojump_clock: Clock, world: World, peers: list[Peer]
) -> None:
    peers[0].lead(1)
    world.tell(peers[0], 1)

    def check() -> None:
        raise ControlError("not-owner", "no")

    with pytest.raises(ControlError, match="no"):
        await peers[0].jobs.ask(JOB, "cancel", {}, check)


async def test_nobody_takes_over(autojump_clock: Clock, world: World, peers: list[Peer]) -> None:
    world.tell(peers[0], 1)
    for peer in peers[:3]:
        world.kill(peer)
    began_s = trio.current_time()
    with pytest.raises(ControlError) as caught:
        await peers[3].ask()
    assert caught.value.code == "leader-unreachable"
    assert "can't be reached" in caught.value.message
    assert GIVE_UP_S <= trio.current_time() - began_s <= GIVE_UP_S + 3 * RETRY_S


# ---- replicas ----------------------------------------------------------------------------------------------------------


def said(followed: Any, data: bytes) -> None:
    """Output that was committed."""
    followed.replica.chronicle.apply(Output(1, followed.view.stdout.length, data))
    followed.view.write_at(1, followed.view.stdout.length, data)
    followed.view.bell.ring()


async def test_replica_shows_committed_output_without_a_leader(autojump_clock: Clock, world: World, peers: list[Peer]) -> None:
    followed = peers[1].follow()
    said(followed, b"committed")
    followed.replica.chronicle.apply(StageOpened(0, b"f" * 32, 1, "f", True, StageOptions()))
    world.tell(peers[0], 1)
    world.kill(peers[0])
    for asker in (peers[1], peers[3]):
        answer, body = await asker.poll(0, limits.POLL_S_MAX)
        assert body == b"committed"
        assert (answer["state"], answer["final"], answer["by"]) == (RUNNING, False, "")
        shown, _ = await asker.ask()
        assert (shown["state"], shown["leader"]) == (RUNNING, "")
        assert [stage["name"] for stage in shown["stages"]] == ["f"]


async def test_replica_does_not_answer_for_a_leader_that_lives(autojump_clock: Clock, world: World, peers: list[Peer]) -> None:
    lead = peers[0].lead(1)
    lead.view.write(1, b"all of it")
    said(peers[1].follow(), b"all")
    world.tell(peers[0], 1)
    _, body = await peers[1].poll()
    assert body == b"all of it"
    with pytest.raises(ControlError) as caught:
        await peers[1].jobs.answer(JOB, "poll", {"stdout": 0})
    assert caught.value.code == "not-leader"


async def test_poll_at_a_replica_never_gives_up(autojump_clock: Clock, world: World, peers: list[Peer]) -> None:
    peers[1].follow()
    world.tell(peers[0], 1)
    for peer in (peers[0], peers[2], peers[3]):
        world.kill(peer)
    for _ in range(5):
        answer, body = await peers[1].poll(0, limits.POLL_S_MAX)
        assert (answer["final"], body) == (False, b"")
    assert trio.current_time() > 5 * limits.POLL_S_MAX


async def test_explain_says_why_there_is_no_leader(autojump_clock: Clock, world: World, peers: list[Peer]) -> None:
    peers[1].follow()
    peers[1].jobs.why_leaderless = lambda job: "2 of 3 replicas are gone, and it is --strict"
    world.tell(peers[0], 1)
    world.kill(peers[0])
    for asker in (peers[1], peers[3]):
        answer, _ = await asker.ask("explain")
        assert answer["reasons"] == [{"code": "no-leader", "text": "2 of 3 replicas are gone, and it is --strict", "tasks": 0}]


async def test_poll_at_a_replica_goes_on_when_this_peer_leads(autojump_clock: Clock, world: World, peers: list[Peer]) -> None:
    followed = peers[1].follow()
    said(followed, b"one ")
    world.tell(peers[0], 1)
    world.kill(peers[0])
    async with trio.open_nursery() as nursery:

        async def change() -> None:
            await trio.sleep(3.0)
            lead = peers[1].lead(2)
            world.tell(peers[1], 2)
            lead.view.write(1, b"two")

        nursery.start_soon(change)
        _, body = await peers[1].poll(4, limits.POLL_S_MAX)
    assert body == b"two"


async def test_output_that_a_replica_missed_comes_from_another(autojump_clock: Clock, world: World, peers: list[Peer]) -> None:
    whole, part = peers[1].follow(), peers[2].follow()
    said(whole, b"the whole output")
    part.view.stdout.expect(10)
    part.view.write_at(1, 10, b"output")
    world.tell(peers[0], 1)
    world.kill(peers[0])
    _, body = await peers[2].poll(0, limits.POLL_S_MAX)
    assert body == b"the whole output"
    world.asked.clear()
    _, body = await peers[2].poll(10, limits.POLL_S_MAX)
    assert body == b"output"
    assert (IDS[1], "poll") not in world.asked


# ---- jobs that are over ------------------------------------------------------------------------------------------------


def archive(peer: Peer, shown: dict[str, Any]) -> None:
    peer.jobs.archive(JOB, SPEC, DONE, shown)


async def test_outcome_is_to_be_had_at_each_replica(autojump_clock: Clock, world: World, peers: list[Peer]) -> None:
    lead = peers[0].lead(3)
    lead.view.write(1, b"result")
    lead.view.finish(DONE)
    shown = lead.describe()
    for peer in peers[:3]:
        if peer is not peers[0]:
            said(peer.follow(), b"result")
        archive(peer, shown)
    world.tell(peers[0], 3, 2, FINISHED)
    world.kill(peers[0])
    for asker in peers[1:]:
        answer, body = await asker.poll(0, limits.POLL_S_MAX)
        assert (body, answer["final"], answer["outcome"]["exit_code"]) == (b"result", True, 0)
        told, _ = await asker.ask()
        assert (told["leader"], told["epoch"], told["state"]) == (IDS[0].hex(), 3, FINISHED)
        assert (await asker.ask("files"))[0] == []
        assert (await asker.ask("cancel"))[0] == {"state": FINISHED} if asker is not peers[3] else True


async def test_outcome_is_found_by_a_peer_that_never_heard_of_the_job(
    autojump_clock: Clock, world: World, peers: list[Peer]
) -> None:
    said(peers[1].follow(), b"result")
    archive(peers[1], {"leader": IDS[0].hex(), "epoch": 2, "replicas": [IDS[1].hex()]})
    answer, body = await peers[3].poll()
    assert (body, answer["final"]) == (b"result", True)


async def test_outcome_that_nobody_keeps_any_more(autojump_clock: Clock, world: World, peers: list[Peer]) -> None:
    world.tell(peers[0], 1, 2, FINISHED)
    world.kill(peers[0])
    began_s = trio.current_time()
    with pytest.raises(ControlError) as caught:
        await peers[3].poll()
    assert caught.value.code == "leader-unreachable"
    assert trio.current_time() - began_s < 2.0, "no leader is to come"


async def test_two_outcomes_are_shown(autojump_clock: Clock, world: World, peers: list[Peer]) -> None:
    archive(peers[1], {"leader": IDS[1].hex(), "epoch": 4, "branch": "aa"})
    branches = Branch(b"\xaa", (b"",)), Branch(b"\xbb", (b"",))
    for branch, state in zip(branches, (FINISHED, CANCELLED), strict=True):
        news = JobNews(SIGNED, 4, IDS[1], ("", 0), 1, state, False, branch=branch)
        peers[1].board.hear(JOB, SPEC, news, 0.0)
    shown, _ = await peers[1].ask()
    assert (shown["branch"], shown["recovered"]) == ("aa", True)
    assert shown["conflicts"] == [{"branch": "bb", "state": CANCELLED, "leader": IDS[1].hex()}]
    assert peers[1].jobs.known()[JOB]["conflict"] is True


def test_keepers_are_named_once_and_never_this_peer(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        peer = world.peers[IDS[1]]
        peer.follow()
        peer.heard(IDS[0], 1)
        assert peer.jobs.holders(JOB) == [IDS[0], IDS[2], LEADER.id, IDS[3]]

    trio.run(main)
