"""Replicas are lost and others take their place, one safe change at a time."""

from __future__ import annotations

import trio

from tests.replica.conftest import Peers
from tests.replica.world import output


async def test_a_lost_voter_is_replaced_by_the_oldest_other_peer(peers: Peers, autojump_clock: object) -> None:
    async with peers(5) as world:
        job = await world.found(replicas=3)
        _, replica = await world.led(job)
        assert set(replica.voters) == {world[n].id for n in (1, 2, 3)}
        await world.say(replica, 0, b"a")
        died_s = trio.current_time()
        await world.kill(3)
        await world.until(lambda: set(replica.voters) == {world[n].id for n in (1, 2, 4)}, 15)
        assert trio.current_time() - died_s < 6
        await world.until(lambda: world[4].replica(job).chronicle.output_length[1] == 1)  # type: ignore[union-attr]


async def test_four_of_four_tolerate_the_next_loss_and_the_next(peers: Peers, autojump_clock: object) -> None:
    async with peers(4) as world:
        job = await world.found()
        _, replica = await world.led(job)
        await world.kill(4)
        await world.until(lambda: len(replica.voters) == 3, 10)
        await world.kill(3)
        await world.say(replica, 0, b"a")
        assert replica.leads()
        assert not replica.branch.name


async def test_of_three_a_lost_voter_without_replacement_keeps_its_place(peers: Peers, autojump_clock: object) -> None:
    async with peers(3) as world:
        job = await world.found()
        _, replica = await world.led(job)
        await world.kill(3)
        await trio.sleep(10)
        assert len(replica.voters) == 3
        await world.say(replica, 0, b"a")
        await world.start(3)
        await world.until(lambda: world[3].shown.get(job) == {0: b"a"}, 5)


async def test_a_returned_peer_is_dismissed_and_enlisted_again(peers: Peers, autojump_clock: object) -> None:
    async with peers(4) as world:
        job = await world.found()
        _, replica = await world.led(job)
        old = world[4].replica(job)
        assert old is not None
        await world.kill(4)
        await world.until(lambda: len(replica.voters) == 3, 10)
        await world.say(replica, 0, b"a")
        await world.start(4)
        await world.until(lambda: len(replica.voters) == 4, 30)
        new = world[4].replica(job)
        assert new is not None
        assert new.node != old.node
        await world.until(lambda: new.chronicle.output_length[1] == 1)


async def test_a_new_peer_joins_a_group_that_is_too_small(peers: Peers, autojump_clock: object) -> None:
    async with peers(3) as world:
        await world.kill(2, 3)
        job = await world.found()
        _, replica = await world.led(job)
        await world.say(replica, 0, b"a")
        await world.start(2)
        await world.until(lambda: len(replica.voters) == 2, 15)
        await world.start(3)
        await world.until(lambda: len(replica.voters) == 3, 15)
        await world.kill(1)
        _, after = await world.led(job)
        assert after.chronicle.output_length[1] == 1
        assert not after.branch.name


async def test_a_damaged_journal_comes_back_under_a_new_incarnation(peers: Peers, autojump_clock: object) -> None:
    async with peers(4) as world:
        job = await world.found()
        _, replica = await world.led(job)
        await world.say(replica, 0, b"a")
        old = world[2].replica(job)
        assert old is not None
        await world.kill(2)
        log = next(path for path in world[2].disk.names if path.name == "log")
        world[2].disk.flip(log, 8 * (len(world[2].disk.content(log)) // 3))
        await world.start(2)
        assert world[2].replica(job) is None
        await world.until(lambda: len(replica.voters) == 4 and old.node not in replica.raft.log.config.voters, 30)
        new = world[2].replica(job)
        assert new is not None
        assert new.node.incarnation != old.node.incarnation
        await world.until(lambda: new.chronicle.output_length[1] == 1)


async def test_a_lost_disk_comes_back_under_a_new_incarnation(peers: Peers, autojump_clock: object) -> None:
    async with peers(4) as world:
        job = await world.found()
        _, replica = await world.led(job)
        await world.kill(2)
        world[2].disk.names.clear()
        await world.start(2)
        assert world[2].replica(job) is None
        await world.until(lambda: len(replica.voters) == 3, 10)
        await world.until(lambda: len(replica.voters) == 4, 30)


async def test_a_full_disk_silences_a_leader_and_it_returns_when_there_is_room(peers: Peers, autojump_clock: object) -> None:
    async with peers(3) as world:
        job = await world.found()
        host, replica = await world.led(job)
        host.disk.free_bytes = 0
        replica.propose([output(0, b"a")])
        after, new = await world.led(job, but=host)
        assert any(said[0] == "stepped down" for said in host.said)
        assert host.replicas is not None
        assert "disk" in host.replicas.waiting(job)
        await world.say(new, new.chronicle.output_length[1], b"b")
        host.disk.free_bytes = 1 << 30
        await world.until(lambda: host.replica(job).applied_index == new.applied_index, 15)  # type: ignore[union-attr]
        assert after.shown[job] == host.shown[job]


async def test_a_disk_that_failed_is_read_anew_and_the_replica_goes_on(peers: Peers, autojump_clock: object) -> None:
    import errno

    async with peers(3) as world:
        job = await world.found()
        host, replica = await world.led(job)
        follower = next(each for each in world.hosts if each is not host)
        follower.disk.broken["fsync"] = errno.EIO
        await world.say(replica, 0, b"a")
        await trio.sleep(2)
        follower.disk.broken.clear()
        await world.say(replica, 1, b"b")
        await world.until(lambda: follower.shown.get(job) == {0: b"a", 1: b"b"}, 10)


async def test_a_member_far_behind_gets_a_snapshot(peers: Peers, autojump_clock: object) -> None:
    async with peers(3) as world:
        job = await world.found()
        host, replica = await world.led(job)
        away = next(each for each in world.hosts if each is not host)
        await world.kill(away.number)
        replica.raft.log.trail_bytes_max = 0
        data = b"x" * (60 << 10)
        for number in range(100):
            await world.say(replica, number * len(data), data)
        assert replica.raft.log.snapshot.index > 50
        await world.start(away.number)
        await world.until(lambda: away.replica(job).chronicle.output_length[1] == 100 * len(data), 20)  # type: ignore[union-attr]
        assert ("restored", b"") in away.said[-200:]
        assert away.replica(job).chronicle.snapshot() == replica.chronicle.snapshot()  # type: ignore[union-attr]
