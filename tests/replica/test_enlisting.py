"""Who may make, replace and end a replica here; votes that are told twice; what is on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from dht.core.codec import CodecError
from dht.core.identity import BadSignature, Identity
from grid.core.errors import RefusedError
from grid.core.job import job_id
from grid.core.mandate import Branch, check_endorsement
from grid.core.messages import Dismissed, Endorse, Endorsed, Enlist, Enlisted, Survey, Surveyed
from grid.core.raft_effects import Persist, Point
from grid.core.raft_log import InvariantError
from grid.core.raft_messages import Appended, Entry, HardState, NodeId, Snapshot, config_of
from grid.journal import Journal
from grid.journal_errors import JournalDamaged
from grid.replica_files import Seat, Shelf
from tests.core.material import signed_spec
from tests.journal.disks import MemoryDisk
from tests.replica.conftest import Peers
from tests.replica.world import World

ME, OTHER = NodeId(b"p" * 20, 77), NodeId(b"q" * 20, 5)
STRANGER = Identity(b"x" * 32).id


async def test_enlisting_puts_a_replica_on_the_disk_that_is_found_after_a_restart(peers: Peers, autojump_clock: object) -> None:
    async with peers(2) as world:
        _, signed = world.spec()
        job = job_id(signed.payload)
        answer = await _request(world, 2, Enlist(signed, Branch(), ((b"b" * 32, 5),)))
        assert isinstance(answer, Enlisted)
        await world.kill(2, power=True)
        await world.start(2)
        found = world[2].replica(job)
        assert found is not None
        assert found.node == NodeId(world[2].id, answer.incarnation)
        assert found.blobs == ((b"b" * 32, 5),)


async def test_a_strangers_spec_is_refused(peers: Peers, autojump_clock: object) -> None:
    async with peers(2) as world:
        _, signed = world.spec()
        forged = type(signed)(signed.payload + b"x", signed.signature, signed.chain)
        with pytest.raises((BadSignature, CodecError)):
            await _request(world, 2, Enlist(forged, Branch()))
        assert not world[2].disk.names


async def test_a_living_replica_is_replaced_and_dismissed_by_its_group_only(peers: Peers, autojump_clock: object) -> None:
    async with peers(3) as world:
        job = await world.found([1, 2])
        await world.led(job)
        _, signed = world.spec()
        old = world[2].replica(job)
        assert old is not None
        replicas = world[2].replicas
        assert replicas is not None
        await world.until(lambda: not old.empty)
        with pytest.raises(RefusedError):
            await replicas.request(STRANGER, Enlist(signed, Branch()))
        with pytest.raises(RefusedError):
            await replicas.handle(STRANGER, Dismissed(job, b"", old.node.incarnation))
        await replicas.handle(world[1].id, Dismissed(job, b"", old.node.incarnation + 1))
        await trio.sleep(1)
        assert world[2].replica(job) is old
        await replicas.handle(world[1].id, Dismissed(job, b"", old.node.incarnation))
        await world.until(lambda: world[2].replica(job) is not old)


async def test_a_peer_that_knows_the_outcome_does_not_enlist(peers: Peers, autojump_clock: object) -> None:
    async with peers(2) as world:
        _, signed = world.spec()
        world[2].final.add(job_id(signed.payload))
        with pytest.raises(RefusedError):
            await _request(world, 2, Enlist(signed, Branch()))


async def test_a_survey_tells_what_is_here(peers: Peers, autojump_clock: object) -> None:
    async with peers(2) as world:
        job = await world.found()
        _host, replica = await world.led(job)
        await world.say(replica, 0, b"a")
        await trio.sleep(1)
        answer = await _request(world, 2, Survey(job, b""))
        assert isinstance(answer, Surveyed)
        assert (answer.last_term, answer.last_index, answer.led, answer.final) == (1, 3, True, False)
        assert await _request(world, 2, Survey(job, b"other")) == Surveyed(0)


async def test_only_a_leader_that_is_followed_is_endorsed(peers: Peers, autojump_clock: object) -> None:
    async with peers(2) as world:
        job = await world.found()
        await world.led(job)
        await trio.sleep(1)
        answer = await _request(world, 2, Endorse(job, b"", 1))
        assert isinstance(answer, Endorsed)
        assert check_endorsement(answer.endorsement, job, b"", 1, world[1].id) == world[2].id
        for epoch, asker in ((2, world[1].id), (1, STRANGER)):
            replicas = world[2].replicas
            assert replicas is not None
            with pytest.raises(RefusedError):
                await replicas.request(asker, Endorse(job, b"", epoch))


async def test_a_replica_nothing_ever_reached_is_forgotten(peers: Peers, autojump_clock: object) -> None:
    async with peers(2) as world:
        _, signed = world.spec()
        await _request(world, 2, Enlist(signed, Branch()))
        await trio.sleep(130)
        assert not world[2].disk.names


class TwiceVoting(Journal):
    """A planted bug's other half: the journal lets a second vote in a term pass."""

    async def set_hard_state(self, term: int, vote: bytes | None) -> None:
        if term == self.hard_state.term and self.hard_state.vote not in (None, vote):
            self._hard = self._staged_hard = self._staged_hard._replace(vote=None)
        await super().set_hard_state(term, vote)


def seat() -> Seat:
    return Seat(b"j" * 32, Branch(), ME, signed_spec())


async def test_the_journal_refuses_a_second_vote_unless_a_test_replaces_it(tmp_path: Path) -> None:
    for kind in (Journal, TwiceVoting):
        folder = tmp_path / kind.__name__
        folder.mkdir()
        book = await Shelf(folder, MemoryDisk(), kind).create(seat())
        await book.write([Persist(Point.PERSIST_VOTE, (HardState(3, ME),))])
        second = [Persist(Point.PERSIST_VOTE, (HardState(3, OTHER),))]
        if kind is Journal:
            with pytest.raises(InvariantError, match="term 3"):
                await book.write(second)
        else:
            await book.write(second)
        await book.close()


async def test_what_the_core_wrote_is_read_back_as_it_was(tmp_path: Path) -> None:
    disk = MemoryDisk()
    shelf = Shelf(tmp_path, disk)
    book = await shelf.create(seat())
    config = config_of([ME, OTHER])
    entries = tuple(Entry(index, 2, data=b"%d" % index) for index in range(2, 7))
    await book.write(
        [
            Persist(Point.PERSIST_FOUNDING, (HardState(1, ME), Snapshot(1, 1, config, b"s"))),
            Persist(Point.PERSIST_TERM, (HardState(2, OTHER),)),
            Persist(Point.PERSIST_FOLLOWER_ENTRIES, (Appended(entries[:3]),)),
            Persist(Point.PERSIST_FOLLOWER_ENTRIES, (Appended(entries[3:]),)),
            Persist(Point.PERSIST_FOLLOWER_ENTRIES, (Appended((Entry(5, 2, data=b"new"),)),)),
        ]
    )
    await book.close()
    again = await shelf.open(book.place)
    assert again.seat == book.seat
    assert again.durable.hard == HardState(2, OTHER)
    assert again.durable.snapshot == Snapshot(1, 1, config, b"s")
    assert again.durable.entries == [*entries[:3], Entry(5, 2, data=b"new")]
    await again.close()
    await shelf.destroy(book.place)
    assert not disk.names


async def test_appends_that_stand_together_share_one_fsync(tmp_path: Path) -> None:
    disk = MemoryDisk()
    book = await Shelf(tmp_path, disk).create(seat())
    await book.write([Persist(Point.PERSIST_FOUNDING, (HardState(1, ME), Snapshot(1, 1, config_of([ME]), b"")))])
    disk.calls.clear()
    await book.write([Persist(Point.PERSIST_LEADER_ENTRIES, (Appended((Entry(n, 1),)),)) for n in range(2, 30)])
    assert disk.calls.count("fsync") == 1
    await book.close()


@pytest.mark.parametrize("flaw", ["no record", "bad record", "no journal", "other incarnation"])
async def test_half_a_replica_is_none(tmp_path: Path, flaw: str) -> None:
    disk = MemoryDisk()
    shelf = Shelf(tmp_path, disk)
    book = await shelf.create(seat())
    await book.close()
    record = book.place / "replica"
    if flaw == "no record":
        disk.unlink(record)
    elif flaw == "bad record":
        disk.flip(record, 200)
    elif flaw == "no journal":
        disk.unlink(book.place / "log")
    else:
        content = disk.content(record)
        other = await shelf.create(Seat(b"j" * 32, Branch(), NodeId(b"p" * 20, 78), signed_spec()))
        await other.close()
        disk.put(record, content)
    with pytest.raises(JournalDamaged):
        await shelf.open(book.place)
    assert not disk.fds


async def _request(world: World, number: int, message: Any) -> Any:
    replicas = world[number].replicas
    assert replicas is not None
    return await replicas.request(world[1].id, message)
