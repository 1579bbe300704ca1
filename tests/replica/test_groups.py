"""A job's group of replicas: founded, led, handed over, ended."""

from __future__ import annotations

import pytest
import trio

from grid.core.job import job_id
from grid.core.mandate import check_mandate
from tests.replica.conftest import Peers
from tests.replica.world import ended, output


async def test_founding_puts_the_job_on_every_candidates_disk(peers: Peers, autojump_clock: object) -> None:
    async with peers(3) as world:
        job = await world.found()
        host, replica = await world.led(job)
        assert host is world[1]
        assert replica.term == 1
        assert not replica.branch.name
        assert set(replica.voters) == {each.id for each in world.hosts}
        assert trio.current_time() < 0.5
        await world.until(lambda: all((other.replica(job) or replica).applied_index >= 2 for other in world.hosts))


async def test_a_peer_alone_founds_at_once(peers: Peers, autojump_clock: object) -> None:
    async with peers(1) as world:
        job = await world.found()
        _, replica = await world.led(job)
        await world.say(replica, 0, b"a")
        assert trio.current_time() < 0.1
        assert world[1].shown[job] == {0: b"a"}


async def test_candidates_that_are_dead_are_left_out_of_the_founding(peers: Peers, autojump_clock: object) -> None:
    async with peers(3) as world:
        await world.kill(3)
        job = await world.found([1, 2, 3])
        _, replica = await world.led(job)
        assert set(replica.voters) == {world[1].id, world[2].id}


@pytest.mark.parametrize("seed", range(12))
async def test_a_group_that_another_member_came_to_lead_is_not_founded_again(
    peers: Peers, autojump_clock: object, seed: int
) -> None:
    async with peers(4, seed=seed) as world:
        job = job_id(world.spec()[1].payload)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.found, [1, 2, 3, 4])
            await world.until(lambda: world[1].replica(job) is not None)
            founded = world[1].replica(job)
            assert founded is not None
            await world.kill(3, 4)  # no majority is left for now
            await trio.sleep(1.0)
            await world.start(4)
        _, leader = await world.led(job)
        assert leader.term > 1
        assert founded.node in leader.raft.log.config.members
        assert world[1].replica(job) is founded


async def test_who_could_not_be_told_that_a_founding_was_given_up_hears_of_it_later(peers: Peers, autojump_clock: object) -> None:
    async with peers(4) as world:
        job = job_id(world.spec(replicas=1)[1].payload)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: world.found([1, 2, 3, 4], replicas=1))
            await world.until(lambda: world[1].replica(job) is not None)
            await world.kill(3, 4)  # no majority is left
            await world.until(lambda: (told := world[2].replica(job)) is not None and not told.empty)
            world.isolate(2)
        told = world[2].replica(job)
        assert told is not None
        host, replica = await world.led(job)
        assert host is world[1]
        assert set(replica.voters) == {world[1].id}
        assert not told.closed.is_set()
        world.cut.clear()
        await world.until(told.closed.is_set)
        assert told.fate == "dismissed"


async def test_facts_are_applied_in_order_on_every_member(peers: Peers, autojump_clock: object) -> None:
    async with peers(3) as world:
        job = await world.found()
        _, replica = await world.led(job)
        for at in range(50):
            last = replica.propose([output(at, b"x")])
        await replica.committed(last)
        await world.until(lambda: all(len(host.shown.get(job, {})) == 50 for host in world.hosts))
        for host in world.hosts:
            told = [said[2].at for said in host.said if said[0] == "applied"]
            assert told == list(range(50))


async def test_the_death_of_the_leader_is_noticed_at_once_by_broken_connections(peers: Peers, autojump_clock: object) -> None:
    async with peers(3) as world:
        job = await world.found()
        host, replica = await world.led(job)
        await world.say(replica, 0, b"a")
        died_s = trio.current_time()
        await world.kill(host.number)
        after, new = await world.led(job, but=host)
        assert trio.current_time() - died_s < 0.6
        assert new.term > 1
        assert new.chronicle.output_length[1] == 1
        await world.say(new, 1, b"b")
        assert after.shown[job] == {0: b"a", 1: b"b"}


async def test_a_leader_that_dies_silently_is_replaced_after_the_election_timeout(peers: Peers, autojump_clock: object) -> None:
    async with peers(3) as world:
        job = await world.found()
        host, _ = await world.led(job)
        world.silent.add(host.number)
        died_s = trio.current_time()
        await world.kill(host.number)
        await world.led(job, but=host)
        assert 1.0 < trio.current_time() - died_s < 5


async def test_leadership_is_transferred_with_all_that_was_said(peers: Peers, autojump_clock: object) -> None:
    async with peers(3) as world:
        job = await world.found()
        host, replica = await world.led(job)
        await world.say(replica, 0, b"a")
        replica.transfer(world[3].id)
        after, new = await world.led(job, but=host)
        assert after is world[3]
        assert new.chronicle.output_length[1] == 1
        assert any(said[0] == "stepped down" for said in host.said)


async def test_a_takeover_carries_a_majoritys_mandate(peers: Peers, autojump_clock: object) -> None:
    async with peers(3) as world:
        job = await world.found()
        host, _ = await world.led(job)
        await world.kill(host.number)
        after, new = await world.led(job, but=host)
        known = [each.id for each in world.hosts]
        check_mandate(new.mandate, job, b"", new.term, after.id, known)
        await world.until(lambda: len(new.mandate.endorsements) == 2)


async def test_a_mandate_gets_the_endorsements_of_all_who_answer(peers: Peers, autojump_clock: object) -> None:
    async with peers(5) as world:
        job = await world.found()
        host, _ = await world.led(job)
        await world.kill(host.number)
        _, new = await world.led(job, but=host)
        await world.until(lambda: len(new.mandate.endorsements) == 4, 3)
        assert set(new.mandate.voters) == {each.id for each in world.hosts}


async def test_an_ended_jobs_group_dissolves_and_leaves_no_files(peers: Peers, autojump_clock: object) -> None:
    async with peers(3) as world:
        job = await world.found()
        _, replica = await world.led(job)
        await replica.committed(replica.propose([ended()]))
        await world.until(lambda: all(host.replica(job) is None for host in world.hosts), 5)
        for host in world.hosts:
            assert not host.disk.names
            assert not list(host.folder.glob("*/raft-*"))
            assert host.said[-1][0] == "gone"
            assert job in host.final


async def test_a_member_that_was_away_at_the_end_learns_it_by_asking(peers: Peers, autojump_clock: object) -> None:
    async with peers(3) as world:
        job = await world.found()
        host, replica = await world.led(job)
        away = next(each for each in world.hosts if each is not host)
        await world.kill(away.number)
        await replica.committed(replica.propose([ended()]))
        await world.until(lambda: all(each.replica(job) is None for each in world.hosts), 20)
        await world.start(away.number)
        assert away.replica(job) is not None
        await world.until(lambda: away.replica(job) is None, 15)
        assert away.said[-1] == ("gone", b"", "final")
