"""A majority is gone: survivors open a branch, or wait; branches and parents meet."""

from __future__ import annotations

import pytest
import trio

from grid.core.job import JobId
from grid.core.mandate import check_mandate
from tests.replica.conftest import Peers
from tests.replica.world import Host, ended, output


@pytest.mark.parametrize("victim", [1, 2])
async def test_of_two_peers_either_may_die(peers: Peers, autojump_clock: object, victim: int) -> None:
    async with peers(2) as world:
        job = await world.found()
        _, replica = await world.led(job)
        await world.say(replica, 0, b"a")
        died_s = trio.current_time()
        await world.kill(victim)
        survivor = world[3 - victim]
        await world.until(lambda: survivor.replica(job) is not None and bool(survivor.replica(job).branch.name))  # type: ignore[union-attr]
        _, branch = await world.led(job)
        assert trio.current_time() - died_s < 10
        assert branch.chronicle.output_length[1] == 1
        assert branch.branch.ancestors == (b"",)
        check_mandate(branch.mandate, job, branch.branch.name, branch.term, survivor.id, [survivor.id])
        await world.say(branch, 1, b"b")
        await branch.committed(branch.propose([ended()]))
        await world.until(lambda: survivor.replica(job) is None, 15)
        assert not survivor.disk.names


async def test_nobody_branches_before_six_seconds_without_a_leader(peers: Peers, autojump_clock: object) -> None:
    async with peers(2) as world:
        job = await world.found()
        await world.led(job)
        await world.kill(1)
        await trio.sleep(5.5)
        assert len(world[2].replicas.all()) == 1  # type: ignore[union-attr]
        assert not world[2].replica(job).branch.name  # type: ignore[union-attr]


async def test_a_strict_job_waits_says_for_whom_and_goes_on(peers: Peers, autojump_clock: object) -> None:
    async with peers(2) as world:
        job = await world.found(strict=True)
        _, replica = await world.led(job)
        await world.say(replica, 0, b"a")
        await world.kill(1)
        await trio.sleep(60)
        survivor = world[2]
        assert survivor.replicas is not None
        assert world.leader(job) is None
        waiting = survivor.replicas.waiting(job)
        assert waiting.startswith("1 of 2 replicas can't be reached")
        assert world[1].id.hex()[:8] in waiting
        await world.start(1)
        _, after = await world.led(job)
        assert not after.branch.name
        assert after.chronicle.output_length[1] == 1
        await world.until(lambda: survivor.replicas is not None and not survivor.replicas.waiting(job))


async def test_the_most_advanced_survivor_opens_the_branch_with_what_was_not_committed(
    peers: Peers, autojump_clock: object
) -> None:
    async with peers(5) as world:
        job = await world.found()
        host, replica = await world.led(job)
        await world.say(replica, 0, b"a")
        behind = [each for each in world.hosts if each is not host][:3]
        for other in behind:
            world.cut.add((host.number, other.number))
        replica.propose([output(1, b"b")])
        best = next(each for each in world.hosts if each is not host and each not in behind)
        await world.until(lambda: _last(best, job) > _last(behind[0], job), 5)
        await world.kill(host.number, behind[0].number, behind[1].number)
        after, branch = await world.led(job, 30)
        assert after is best
        assert branch.branch.name
        assert branch.chronicle.output_length[1] == 2
        await world.until(lambda: set(branch.voters) == {best.id, behind[2].id}, 30)


async def test_all_but_one_of_five_die_one_after_the_other(peers: Peers, autojump_clock: object) -> None:
    async with peers(5) as world:
        job = await world.found()
        said = 0
        for _ in range(4):
            host, replica = await world.led(job, 60)
            await world.say(replica, said, b"x")
            said += 1
            await world.kill(host.number)
        last, replica = await world.led(job, 60)
        assert replica.chronicle.output_length[1] == said
        await world.say(replica, said, b"x")
        assert last.shown[job] == dict.fromkeys(range(said + 1), b"x")


async def test_four_of_five_die_at_once(peers: Peers, autojump_clock: object) -> None:
    async with peers(5) as world:
        job = await world.found()
        _, replica = await world.led(job)
        await world.say(replica, 0, b"a")
        await trio.sleep(1)
        await world.kill(1, 2, 3, 4)
        last, after = await world.led(job, 30)
        assert last is world[5]
        assert after.branch.name
        assert after.chronicle.output_length[1] == 1


async def test_the_returned_parent_joins_the_branch(peers: Peers, autojump_clock: object) -> None:
    async with peers(2) as world:
        job = await world.found()
        _, replica = await world.led(job)
        await world.say(replica, 0, b"a")
        await world.kill(1)
        _, branch = await world.led(job, 20)
        await world.say(branch, 1, b"b")
        await world.start(1)
        await world.until(lambda: set(branch.voters) == {world[1].id, world[2].id}, 30)
        back = world[1].replica(job)
        assert back is not None
        assert back.branch == branch.branch
        await world.until(lambda: world[1].shown[job] == {0: b"a", 1: b"b"} or back.chronicle.output_length[1] == 2)
        assert len(world[1].replicas.all()) == 1  # type: ignore[union-attr]
        await world.kill(2)
        after, _ = await world.led(job, 30)
        assert after is world[1]


async def test_both_halves_of_a_partition_branch_and_the_lower_name_wins(peers: Peers, autojump_clock: object) -> None:
    async with peers(2) as world:
        job = await world.found()
        await world.led(job)
        world.isolate(1)
        await world.until(lambda: all(host.replica(job).branch.name and host.replica(job).leads() for host in world.hosts), 30)  # type: ignore[union-attr]
        first, second = (host.replica(job) for host in world.hosts)
        assert first is not None
        assert second is not None
        assert first.branch != second.branch
        world.cut.clear()
        by = {first: world[1], second: world[2]}
        winner = min((first, second), key=lambda replica: replica.branch.name)
        for host in world.hosts:
            assert host.replicas is not None
            host.news[job] = (winner.branch, 1, 1, False), by[winner].id, trio.current_time()
            host.replicas.heard(job, host.news[job][0])
        await world.until(lambda: set(winner.voters) == {world[1].id, world[2].id}, 30)
        assert {host.replica(job).branch.name for host in world.hosts} == {winner.branch.name}  # type: ignore[union-attr]


async def test_a_parent_with_a_majority_beats_the_branch_of_its_minority(peers: Peers, autojump_clock: object) -> None:
    async with peers(5) as world:
        job = await world.found()
        host, replica = await world.led(job)
        others = [each for each in world.hosts if each is not host]
        minority = others[:2]
        world.isolate(*(each.number for each in minority))
        await world.until(lambda: all(each.replica(job).branch.name for each in minority), 30)  # type: ignore[union-attr]
        assert replica.leads()
        assert set(replica.voters) == {host.id, others[2].id, others[3].id}
        await world.say(replica, 0, b"a")
        world.cut.clear()
        for each in minority:
            assert each.replicas is not None
            each.news[job] = (replica.branch, replica.term, 100, False), host.id, trio.current_time()
            each.replicas.heard(job, each.news[job][0])
        await world.until(lambda: len(replica.voters) == 5, 60)
        assert all(len(each.replicas.all()) == 1 for each in world.hosts)  # type: ignore[union-attr]
        await world.until(lambda: all(each.replica(job).chronicle.output_length[1] == 1 for each in minority))  # type: ignore[union-attr]


async def test_news_of_a_branch_does_not_end_a_parent_that_is_led(peers: Peers, autojump_clock: object) -> None:
    async with peers(3) as world:
        job = await world.found()
        host, replica = await world.led(job)
        assert host.replicas is not None
        branch = replica.branch.child(1, 2, b"", b"x" * 20, 1, 3)
        host.news[job] = (branch, 1, 1, False), world[2].id, trio.current_time()
        host.replicas.heard(job, host.news[job][0])
        await trio.sleep(1)
        assert replica.leads()


async def test_a_machine_that_slept_waits_anew_before_it_asks(peers: Peers, autojump_clock: object) -> None:
    async with peers(2) as world:
        job = await world.found()
        await world.led(job)
        world[2].clock_offset_s += 3600
        world.isolate(2)
        await trio.sleep(5)
        assert not world[2].replica(job).branch.name  # type: ignore[union-attr]


async def test_who_hears_of_a_leader_elsewhere_opens_no_branch(peers: Peers, autojump_clock: object) -> None:
    async with peers(2) as world:
        job = await world.found()
        _, replica = await world.led(job)
        await world.kill(1)
        for _ in range(20):
            world[2].news[job] = (replica.branch, 5, 1, False), world[1].id, trio.current_time()
            await trio.sleep(1)
        assert not world[2].replica(job).branch.name  # type: ignore[union-attr]
        await world.until(lambda: bool(world[2].replica(job).branch.name), 20)  # type: ignore[union-attr]
        branch = world[2].replica(job).branch  # type: ignore[union-attr]
        assert (branch.base_epoch, branch.base_version) == (5, 4)


def _last(host: Host, job: JobId) -> int:
    replica = host.replica(job)
    assert replica is not None
    return replica.raft.log.last_index


async def test_stale_news_of_a_dead_parent_does_not_end_the_last_copy(peers: Peers, autojump_clock: object) -> None:
    async with peers(2) as world:
        job = await world.found()
        _, replica = await world.led(job)
        await world.kill(1)
        _, branch = await world.led(job, 20)
        assert world[2].replicas is not None
        world[2].news[job] = (replica.branch, 7, 100, False), world[1].id, trio.current_time()
        world[2].replicas.heard(job, world[2].news[job][0])
        await trio.sleep(5)
        assert branch.leads()
