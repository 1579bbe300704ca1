"""Jobs whose peers die, stop and return, seen from outside: what ran, who leads, and what became of it.

What is measured. Each task writes a line when it begins and one when it ends into a diary outside the job, with the clock that
all processes of a machine share: an execution. A task is *finished* at a moment when an execution of it had ended by then,
reported or not (so the measure is strict: what was lost on the way to the leader counts). It ran *again* if another execution
began after that moment. An execution that the moment interrupted was not finished: it costs nothing here.

Rules: nobody is told of a kill; whoever is asked about a job runs and can answer; every wait is for an observed state and has a
deadline.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grid.api.client import Client, ControlError
from tests.e2e.grids import CHILDREN_END_S, READY_S, Grid, Peer, Pid, until

SEEN_S = 20.0
CONTACTS_S = 30.0
"""A peer writes down whom it knows now and then; one that was killed before it did can't find back."""
TAKEOVER_S = 40.0
"""Far more than an election takes: the machine is shared, and no test asserts a time."""
END_S = 90.0
AGAIN_MAX = 0.05
"""Of the finished tasks, those that may run again when a peer is lost."""

NOTE = """
import os, time
import grid

def note(what, key):
    line = f"{what} {key} {grid.context().peer} {time.monotonic_ns()}\\n"
    diary = os.open(os.environ["DIARY"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(diary, line.encode())
    os.close(diary)
"""
"""What a script that keeps a diary begins with: one write a line, appended whole or not at all."""

STEADY = """
def work(i):
    note("+", i)
    time.sleep({task_s})
    note("-", i)
    return i * i

seen = total = 0
for value in grid.map(work, range({count})):
    seen += 1
    total += value
    if seen % 10 == 0:
        print(seen, total, flush=True)
print("all", seen, total)
"""


def steady(count: int, task_s: float = 0.05) -> str:
    """A script of `count` tasks that sleep; it prints the sum of squares as it grows."""
    return NOTE + STEADY.format(count=count, task_s=task_s)


def printed(count: int) -> str:
    """What `steady` prints, whatever happens to whom."""
    total, lines = 0, []
    for i in range(count):
        total += i * i
        if (i + 1) % 10 == 0:
            lines.append(f"{i + 1} {total}\n")
    return "".join(lines) + f"all {count} {total}\n"


@dataclass(frozen=True)
class Note:
    """An execution of a task began or ended."""

    ended: bool
    task: str
    peer: str
    at_s: float


@dataclass(frozen=True)
class Diary:
    """What ran, where and when, told by the tasks themselves."""

    path: Path

    @property
    def options(self) -> tuple[str, str]:
        """For `grid submit`."""
        return "--env", f"DIARY={self.path}"

    def notes(self) -> list[Note]:
        """All so far, in the order of their clock."""
        if not self.path.exists():
            return []
        whole = self.path.read_text().rpartition("\n")[0]  # a line that is being written may be seen in part
        words = (line.split() for line in whole.splitlines())
        return sorted((Note(w[0] == "-", w[1], w[2], int(w[3]) / 1e9) for w in words), key=lambda note: note.at_s)

    def executions(self) -> Counter[str]:
        """How often each task began."""
        return Counter(note.task for note in self.notes() if not note.ended)

    def begun(self) -> int:
        """Executions so far."""
        return sum(not note.ended for note in self.notes())

    def finished(self, at_s: float) -> set[str]:
        """Tasks that had ended by then."""
        return {note.task for note in self.notes() if note.ended and note.at_s < at_s}

    def again(self, at_s: float) -> set[str]:
        """Tasks that had ended by then and began again later."""
        return self.finished(at_s) & {note.task for note in self.notes() if not note.ended and note.at_s > at_s}

    def pause_s(self, from_s: float, to_s: float) -> float:
        """The longest time in which no task began anywhere, of those that overlap this interval and were followed by work."""
        starts = [note.at_s for note in self.notes() if not note.ended]
        return max((b - a for a, b in itertools.pairwise(starts) if b > from_s and a < to_s), default=0.0)


def ask(peer: Peer, method: str, **params: Any) -> Any:
    """What a command would ask of this peer, without starting one: for questions asked again and again. None: no answer."""
    with contextlib.suppress(ControlError, OSError), Client.open(peer.home) as client:
        return client.call(method, **params)
    return None


def grow(grid: Grid, count: int, *words: str, slots: int = 1) -> list[Peer]:
    """Start a grid of so many peers, the later ones at once; all see all."""
    first = grid.found(slots=slots)
    invite = str(first("invite", "--json", "--uses", str(count)).json["invite"])
    peers = [first, *(grid.home() for _ in range(count - 1))]
    start([peer for peer in peers if peer is not first], *words, invite, slots=slots)
    see_each_other(peers)
    return peers


def start(peers: Sequence[Peer], *words: str, slots: int = 1) -> None:
    """Start these at once, each with the home it has."""
    with ThreadPoolExecutor(max(len(peers), 1)) as pool:
        for started in [pool.submit(peer.start, *words, slots=slots) for peer in peers]:
            started.result()


def see_each_other(peers: Sequence[Peer]) -> None:
    """Wait until each of these lists all of them as alive."""
    wanted = {peer.id for peer in peers}
    for peer in peers:

        def sees(peer: Peer = peer) -> bool:
            status = ask(peer, "status") or {"peers": []}
            return wanted <= {row["id"] for row in status["peers"] if row["state"] == "alive"}

        until(sees, SEEN_S, f"{peer.home.name} sees all")


def can_come_back(peers: Sequence[Peer]) -> None:
    """Wait until each has written down whom it knows."""
    for peer in peers:
        until(lambda peer=peer: (peer.home / "contacts").exists(), CONTACTS_S, "whom it knows is on disk")  # type: ignore[misc]


def revive(peers: Sequence[Peer], slots: int = 1) -> None:
    """Start again those that do not run."""
    start([peer for peer in peers if not peer.running], slots=slots)
    see_each_other(peers)


def freeze(peer: Peer) -> list[Pid]:
    """SIGSTOP to a peer and all its children, as when a laptop's lid closes."""
    assert peer.process is not None
    peer.process.send_signal(signal.SIGSTOP)  # first, so that it asks for no more children
    stopped: list[Pid] = []
    while more := [pid for pid in peer.processes() if pid not in stopped]:
        for pid in more:
            pid.send(signal.SIGSTOP)
        stopped += more
    return stopped


@dataclass
class Watched:
    """A job that was submitted detached, asked after at whoever can answer."""

    id: str
    peers: list[Peer]
    diary: Diary
    mute: list[Peer] = field(default_factory=list)  # they run, and can't be asked: stopped, cut off
    deaths_s: list[float] = field(default_factory=list)

    # ---- what is seen ----

    @property
    def witnesses(self) -> list[Peer]:
        """Who can be asked."""
        return [peer for peer in self.peers if peer.running and peer not in self.mute]

    def shown(self) -> dict[str, Any]:
        """As the first witness has it that has it."""

        def look() -> dict[str, Any] | None:
            return next((shown for peer in self.witnesses if (shown := ask(peer, "show", job=self.id))), None)

        return until(look, TAKEOVER_S, f"somebody knows job {self.id[:8]}")

    def leader(self) -> Peer:
        """Who leads, of the witnesses; all that answer agree."""

        def look() -> Peer | None:
            answers = [shown for peer in self.witnesses if (shown := ask(peer, "show", job=self.id))]
            named = {str(shown["leader"]) for shown in answers}
            return next((peer for peer in self.witnesses if named == {peer.id}), None)

        return until(look, TAKEOVER_S, f"a living peer leads job {self.id[:8]}")

    @property
    def over(self) -> bool:
        """Some witness has its outcome."""
        states = ((ask(peer, "show", job=self.id) or {}).get("state") for peer in self.witnesses)
        return any(state in ("finished", "failed", "cancelled") for state in states)

    def begun(self, executions: int, within_s: float = TAKEOVER_S) -> None:
        """Wait until so many executions began in all, or the job is over."""
        until(lambda: self.diary.begun() >= executions or self.over, within_s, f"{executions} executions of job {self.id[:8]}")

    def counted(self) -> None:
        """Wait until somebody leads, and has counted as many tasks as had ended by then; or the job is over."""
        self.leader()
        ended = len(self.diary.finished(time.monotonic()))

        def look() -> bool:
            shown = ask(self.leader(), "show", job=self.id) or {"stages": []}
            return self.over or sum(stage["done"] for stage in shown["stages"]) >= ended

        until(look, TAKEOVER_S, f"{ended} tasks of job {self.id[:8]} are counted")

    def output(self, through: Peer | None = None) -> tuple[str, str]:
        """The driver's stdout and stderr that a witness shows by now."""
        shown = {"stdout": bytearray(), "stderr": bytearray()}
        with Client.open((through or self.witnesses[0]).home) as client:
            for name, _data, body in client.stream("logs", job=self.id, follow=False, stage=None, index=None):
                shown.get(name, bytearray()).extend(body)
        return shown["stdout"].decode(), shown["stderr"].decode()

    def stdout(self, through: Peer | None = None) -> str:
        """The driver's stdout that a witness shows by now."""
        return self.output(through)[0]

    # ---- what is done ----

    def kill(self, *peers: Peer) -> float:
        """SIGKILL to these peers alone, at once; all their children must end all the same. Returns when it was."""
        processes = [peer.process for peer in peers if peer.process is not None]
        trees = [pid for peer in peers for pid in peer.processes()]
        at_s = time.monotonic()
        self.deaths_s.append(at_s)
        for process in processes:
            process.kill()
        try:
            for process in processes:
                process.wait(READY_S)
            until(lambda: not any(pid.lives for pid in trees), CHILDREN_END_S, "the peers' children end")
        finally:
            for pid in trees:
                pid.send(signal.SIGKILL)
        return at_s

    def unplug(self, peer: Peer) -> float:
        """A death that nobody is told of, not even by a connection that ends: what is sent to it is lost. `bury` it later."""
        at_s = time.monotonic()
        self.deaths_s.append(at_s)
        freeze(peer)
        self.mute.append(peer)
        return at_s

    def bury(self, peer: Peer) -> None:
        """End what was unplugged."""
        assert peer.process is not None
        for pid in (pids := peer.processes()):
            pid.send(signal.SIGKILL)
        peer.process.wait(READY_S)
        until(lambda: not any(pid.lives for pid in pids), CHILDREN_END_S, "all of it ends")
        self.mute.remove(peer)

    @contextlib.contextmanager
    def frozen(self, peer: Peer) -> Iterator[float]:
        """A peer that is stopped meanwhile."""
        at_s = time.monotonic()
        pids = freeze(peer)
        self.mute.append(peer)
        self.deaths_s.append(at_s)
        try:
            yield at_s
        finally:
            for pid in reversed(pids):  # the peer last: its children's sockets are in order when it looks
                pid.send(signal.SIGCONT)
            self.mute.remove(peer)

    # ---- what must hold ----

    def ends(self, out: str, count: int) -> dict[str, Any]:
        """It ended well and printed this; each task was counted once; all witnesses say the same. Returns what is shown."""
        first = self.witnesses[0]
        done = first("result", self.id, within_s=END_S)
        assert (done.status, done.out) == (0, out), (done, self.logs())
        shown: dict[str, Any] = first.show(self.id)
        assert (shown["state"], shown["exit_code"]) == ("finished", 0)
        assert [(stage["total"], stage["done"], stage["failed"]) for stage in shown["stages"]] == [(count, count, 0)]
        assert sum(tally["done"] for tally in shown["peers"].values()) == count, shown["peers"]
        for peer in self.witnesses[1:]:
            until(lambda peer=peer: same(peer, shown), TAKEOVER_S, f"{peer.home.name} has the same outcome")  # type: ignore[misc]
            assert self.stdout(peer) == out
        return shown

    def wasted(self) -> set[str]:
        """Tasks that ran again although they had finished when somebody died."""
        return set().union(*(self.diary.again(at_s) for at_s in self.deaths_s))

    def spares_finished_work(self) -> None:
        """At most a twentieth of the tasks that had finished at the last death ran again after any."""
        finished = self.diary.finished(self.deaths_s[-1])
        wasted = self.wasted()
        why = [note for note in self.diary.notes() if note.task in wasted]
        assert len(wasted) <= AGAIN_MAX * len(finished), (len(wasted), len(finished), self.deaths_s, why, self.logs())

    def logs(self) -> str:
        """The ends of the peers' logs: for whoever reads a failure."""
        return "\n".join(f"--- {peer.home.name} {peer.id[:8]}\n{peer.log.read_text()[-1500:]}" for peer in self.peers)


def same(peer: Peer, shown: dict[str, Any]) -> bool:
    """This peer's account of an ended job agrees with that one in all that is said of its outcome."""
    told = ask(peer, "show", job=shown["id"]) or {}
    return all(told.get(key) == shown[key] for key in ("state", "exit_code", "stages", "recovered", "error"))


def submit(
    through: Peer, peers: Sequence[Peer], script: str, *options: str, file: str = "job.py", arguments: Sequence[str] = ()
) -> Watched:
    """Submit a script that keeps a diary, detached; returns at once when the command did."""
    diary = Diary(through.folder.parent / f"diary-{os.urandom(4).hex()}.txt")
    done = through("submit", "-d", *diary.options, *options, through.script(script, file), *arguments)
    assert done.status == 0, done.err
    return Watched(done.out.strip(), list(peers), diary)
