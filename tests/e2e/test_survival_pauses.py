"""Peers that are there and yet not: stopped and woken, or cut off in one direction. One leader's word counts, one outcome stands.

The cuts are made between network namespaces of the test's own, joined by a bridge in one more: a wrong, permanent link address in
one peer's neighbour table loses, silently, what that peer sends to the other, and nothing that comes back. Nothing outside these
namespaces is touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.grids import Grid, Peer, until
from tests.e2e.survival import END_S, TAKEOVER_S, Watched, ask, grow, printed, same, see_each_other, steady, submit

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

COUNT, LONG, SHORT = 300, 500, 60
LOST_S = 20.0
NOBODY = "02:00:00:00:ff:ff"
"""A link address that no interface has."""


def go_on_without(job: Watched) -> Peer:
    """Wait until another leads and work goes on; returns who."""
    successor = job.leader()
    job.begun(job.diary.begun() + 20)
    return successor


def agree(job: Watched, peer: Peer, count: int = COUNT) -> None:
    """The one that was away has the outcome that all others have, and showed nothing else."""
    shown = job.ends(printed(count), count)
    until(lambda: same(peer, shown), TAKEOVER_S, "the one that was away has the same outcome")
    assert job.stdout(peer) == printed(count)


def test_leader_stops_and_wakes(grid: Grid) -> None:
    """Of two jobs that it led one is over when it wakes, the other is led by somebody else."""
    peers = grow(grid, 3)
    long, short = submit(peers[0], peers, steady(LONG)), submit(peers[0], peers, steady(SHORT))
    for job in (long, short):
        job.begun(30)
    with long.frozen(peers[0]) as at_s:
        short.mute.append(peers[0])
        short.deaths_s.append(at_s)
        successor = go_on_without(long)
        until(lambda: short.over, END_S, "the short job is over")
        assert not long.over
    short.mute.clear()
    until(lambda: long.over or peers[0].show(long.id)["leader"] == successor.id, TAKEOVER_S, "the old leader follows the new one")
    agree(long, peers[0], LONG)
    agree(short, peers[0], SHORT)
    for job in (long, short):
        job.spares_finished_work()


def alive(peer: Peer) -> set[str]:
    """Whom this peer lists as alive."""
    return {row["id"] for row in (ask(peer, "status") or {"peers": []})["peers"] if row["state"] == "alive"}


def ip(*words: str) -> None:
    """Run `ip`. Raises CalledProcessError."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Cables:
    """A namespace for each of so many peers, all on one bridge."""

    def __init__(self, count: int) -> None:
        self._names = [f"grid-{os.getpid()}-{i}" for i in range(count)]
        self._hub = f"grid-{os.getpid()}-hub"

    def lay(self) -> None:
        """Make them. Raises CalledProcessError."""
        ip("netns", "add", self._hub)
        ip("-n", self._hub, "link", "add", "hub", "type", "bridge")
        ip("-n", self._hub, "link", "set", "hub", "up")
        for i, name in enumerate(self._names):
            ip("netns", "add", name)
            ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{i}", "netns", self._hub)
            ip("-n", self._hub, "link", "set", f"port{i}", "master", "hub", "up")
            ip("-n", name, "addr", "add", f"{self.address(i)}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                ip("-n", name, "link", "set", interface, "up")

    def remove(self) -> None:
        """Take away what was made."""
        for name in (*self._names, self._hub):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)

    def address(self, i: int) -> str:
        """Of one peer."""
        return f"10.143.7.{i + 1}"

    def plug(self, peer: Peer, i: int, *words: str) -> Peer:
        """Start a peer in its namespace."""
        peer.wrapper = ["ip", "netns", "exec", self._names[i]]
        return peer.start(*words, listen=f"{self.address(i)}:0")

    def cut(self, source: int, target: int) -> None:
        """What the one sends to the other is lost from now on."""
        neighbour = (self.address(target), "dev", "eth0", "lladdr", NOBODY, "nud", "permanent")
        ip("-n", self._names[source], "neigh", "replace", *neighbour)

    def mend(self, source: int, target: int) -> None:
        """And arrives again."""
        ip("-n", self._names[source], "neigh", "del", self.address(target), "dev", "eth0")


@pytest.fixture
def cables() -> Iterator[Cables]:
    """For three peers."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the program ip")
    made = Cables(3)
    try:
        made.lay()
        yield made
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    finally:
        made.remove()


@pytest.mark.parametrize("direction", ["its words are lost", "it hears nobody"])
@pytest.mark.parametrize("role", ["leader", "follower"])
def test_cut_in_one_direction(cables: Cables, tmp_path: Path, role: str, direction: str) -> None:
    with Grid(tmp_path) as grid:
        peers = [cables.plug(grid.home(), 0)]
        peers += [cables.plug(grid.home(), i, peers[0].invite) for i in (1, 2)]
        see_each_other(peers)
        job = submit(peers[0], peers, steady(COUNT))
        job.begun(60)
        victim = 0 if role == "leader" else 2
        others = [i for i in range(3) if i != victim]
        pairs = [(victim, i) if direction == "its words are lost" else (i, victim) for i in others]
        for source, target in pairs:
            cables.cut(source, target)
        job.mute.append(peers[victim])
        until(lambda: peers[victim].id not in alive(peers[1]), LOST_S, "the cut is noticed")
        successor = go_on_without(job)
        assert not job.over
        assert (successor is peers[0]) == (role == "follower")
        for source, target in pairs:
            cables.mend(source, target)
        job.mute.clear()
        agree(job, peers[victim])
