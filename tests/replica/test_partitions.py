"""Leaders that are cut off, one way or both, or that slept: they stop before anybody else leads."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from grid.core.errors import NotLeadingError
from grid.core.messages import Message
from grid.replica_batch import PATIENCE_S, PENDING_BYTES_MAX
from tests.replica.conftest import Peers
from tests.replica.world import Host, output


@pytest.mark.parametrize("way", ["mute", "deaf", "both"])
async def test_a_leader_cut_off_one_way_is_fenced_and_another_leads(peers: Peers, autojump_clock: object, way: str) -> None:
    async with peers(3) as world:
        job = await world.found()
        host, replica = await world.led(job)
        await world.say(replica, 0, b"a")
        for other in world.hosts:
            if other is not host:
                if way in ("mute", "both"):
                    world.cut.add((host.number, other.number))
                if way in ("deaf", "both"):
                    world.cut.add((other.number, host.number))
        lost = replica.propose([output(1, b"never")])
        after, new = await world.led(job, but=host)
        assert not replica.leads()
        with pytest.raises(NotLeadingError):
            await replica.committed(lost)
        with pytest.raises(NotLeadingError):
            replica.propose([output(1, b"never")])
        await world.say(new, 1, b"b")
        world.cut.clear()
        await world.until(lambda: host.shown[job] == {0: b"a", 1: b"b"}, 20)
        assert after.shown[job] == host.shown[job]


async def test_a_leader_that_slept_does_nothing_before_it_steps_down(peers: Peers, autojump_clock: object) -> None:
    async with peers(3) as world:
        job = await world.found()
        host, replica = await world.led(job)
        await world.say(replica, 0, b"a")
        host.clock_offset_s += 60
        assert not replica.leads()
        with pytest.raises(NotLeadingError):
            replica.propose([output(1, b"never")])
        sent: list[tuple[Host, Message]] = []

        def watch(sender: Host, to: Host, message: Message) -> bool:
            sent.append((sender, message))
            return True

        world.watch = watch
        await world.until(lambda: any(said[0] == "stepped down" for said in host.said), 5)
        assert not [message for sender, message in sent if sender is host]
        await world.led(job)


async def test_a_stopped_leader_is_replaced_and_follows_when_it_goes_on(peers: Peers, autojump_clock: object) -> None:
    """SIGSTOP for a minute: its disk calls do not return meanwhile, its mail waits."""
    async with peers(3) as world:
        job = await world.found()
        host, replica = await world.led(job)
        host.disk.gate = trio.Event()
        replica.propose([output(0, b"a")])
        after, new = await world.led(job, but=host)
        assert host.said[-1] == ("stepped down", "a majority was not heard in time")
        await trio.sleep(60)
        assert not replica.leads()
        await world.say(new, new.chronicle.output_length[1], b"b")
        host.disk.gate.set()
        host.disk.gate = None
        await world.until(lambda: (found := host.replica(job)) is not None and found.applied_index == new.applied_index, 30)
        assert host.shown[job] == after.shown[job]


async def test_facts_that_wait_for_company_leave_when_a_peer_is_lost_or_somebody_waits(
    peers: Peers, autojump_clock: object
) -> None:
    async with peers(3) as world:
        job = await world.found()
        host, replica = await world.led(job)
        await trio.sleep(1)
        assert replica.term == 1
        took_s = []
        for number, event in enumerate(("nothing", "wait", "loss", "nothing")):
            began_s = trio.current_time()
            last = replica.propose([output(number, b"x")], patient=True)
            await trio.testing.wait_all_tasks_blocked()
            if event == "loss":
                replica.disconnected(next(peer for peer in replica.voters if peer != host.id))
            await replica.committed(last, patient=event != "wait")
            took_s.append(trio.current_time() - began_s)
        assert took_s[0] >= PATIENCE_S
        assert max(took_s[1:]) < PATIENCE_S, "deaths come in series: no patience for a while after one"


async def test_room_waits_while_too_much_is_not_committed(peers: Peers, autojump_clock: object) -> None:
    async with peers(3) as world:
        job = await world.found()
        host, replica = await world.led(job)
        gates = [each.disk for each in world.hosts if each is not host]
        for disk in gates:
            disk.gate = trio.Event()
        data = b"x" * (512 << 10)
        while replica.pending_bytes <= PENDING_BYTES_MAX:
            last = replica.propose([output(0, data)])
        with trio.move_on_after(0.5) as waited:
            await replica.room()
        assert waited.cancelled_caught
        for disk in gates:
            gate, disk.gate = disk.gate, None
            assert gate is not None
            gate.set()
        with trio.fail_after(5):
            await replica.room()
            await replica.committed(last)
        assert replica.pending_bytes == 0


async def test_a_lossy_wire_delays_and_loses_nothing(peers: Peers, autojump_clock: object) -> None:
    async with peers(3, seed=3) as world:
        job = await world.found()
        _, replica = await world.led(job)
        world.loss = 0.2
        at = 0
        for _ in range(50):
            _, replica = await world.led(job, 60)
            try:
                with trio.move_on_after(5):
                    await world.say(replica, at, b"x")
            except NotLeadingError:
                continue
            at = replica.chronicle.output_length[1]
        world.loss = 0.0
        await world.until(lambda: len({host.shown[job].keys().__len__() for host in world.hosts}) == 1)
        assert at > 30
