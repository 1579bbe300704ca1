"""Work over several peers: shares, steals, newcomers and losses, inputs, environments."""

from __future__ import annotations

import hashlib
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.e2e.grids import Grid, Peer, until

pytestmark = pytest.mark.real

SLEEPY = """
import time
import grid

def work(i):
    time.sleep({task_s})
    return i * i

total = 0
seen = 0
for value in grid.map(work, range({count})):
    total += value
    seen += 1
print(seen, total)
"""


def sleepy(count: int, task_s: float) -> str:
    """A script of `count` tasks that sleep: its peers' slots, not this machine's cores, are the limit."""
    return SLEEPY.format(count=count, task_s=task_s)


def squares(count: int) -> str:
    """What `sleepy` prints."""
    return f"{count} {sum(i * i for i in range(count))}\n"


def done_by(shown: object) -> dict[str, int]:
    """Tasks settled by each peer."""
    assert isinstance(shown, dict)
    return {peer: counts["done"] for peer, counts in shown["peers"].items()}


def test_every_peer_does_a_fair_part(three: list[Peer]) -> None:
    count = 450
    done = three[1].job(sleepy(count, 0.02))
    assert (done.status, done.out) == (0, squares(count))
    shown = three[1].show("last")
    assert shown["state"] == "finished"
    assert shown["exit_code"] == 0
    assert shown["leader"] == three[1].id
    assert [(stage["total"], stage["done"], stage["failed"]) for stage in shown["stages"]] == [(count, count, 0)]
    assert sum(done_by(shown).values()) == count
    for peer in three:
        assert shown["peers"][peer.id]["done"] >= count // 6, shown["peers"]
        assert peer is three[1] or shown["peers"][peer.id]["stolen"] > 0
    for other in (three[0], three[2]):
        assert other.show(shown["id"]) == shown


def test_newcomer_works_within_two_seconds(grid: Grid) -> None:
    first = grid.found()
    second = grid.join(first)
    third = grid.join(first)
    count = 700
    job = first.detached(sleepy(count, 0.03))
    until(lambda: len([n for n in done_by(first.show(job)).values() if n]) == 3, 10, "three peers work")
    fourth = grid.join(third)
    until(lambda: done_by(first.show(job)).get(fourth.id), 2.0, "the newcomer works")
    done = first("result", job)
    assert (done.status, done.out) == (0, squares(count))
    assert set(done_by(first.show(job))) == {first.id, second.id, third.id, fourth.id}


def test_killed_peer_costs_no_result(grid: Grid) -> None:
    first = grid.found()
    second = grid.join(first)
    third = grid.join(first)
    count = 400
    job = first.detached(sleepy(count, 0.03))
    until(lambda: done_by(first.show(job)).get(second.id, 0) > 5, 10, "the second peer works")
    second.kill()
    done = first("result", job)
    assert (done.status, done.out) == (0, squares(count))
    shown = first.show(job)
    assert sum(done_by(shown).values()) == count
    assert shown["stages"][0]["done"] == count
    assert shown["stages"][0]["failed"] == 0
    assert third.show(job)["peers"] == shown["peers"]


def test_stopped_peer_is_worked_around(grid: Grid) -> None:
    """SIGSTOP: its connections stand, it says nothing; later it wakes with work that others did."""
    first = grid.found()
    second = grid.join(first)
    count = 200
    job = first.detached(sleepy(count, 0.03))
    until(lambda: done_by(first.show(job)).get(second.id, 0) > 5, 10, "the second peer works")
    pids = second.processes()
    for pid in pids:
        pid.send(signal.SIGSTOP)
    try:
        done = first("result", job)
        assert (done.status, done.out) == (0, squares(count))
        assert sum(done_by(first.show(job)).values()) == count
    finally:
        for pid in pids:
            pid.send(signal.SIGCONT)
    again = second.job(sleepy(60, 0.01))
    assert (again.status, again.out) == (0, squares(60))


def test_peer_that_leaves_hands_its_work_back(grid: Grid) -> None:
    first = grid.found()
    second = grid.join(first)
    count = 200
    job = first.detached(sleepy(count, 0.03))
    until(lambda: done_by(first.show(job)).get(second.id, 0) > 5, 10, "the second peer works")
    assert second("leave").status == 0
    done = first("result", job)
    assert (done.status, done.out) == (0, squares(count))
    assert sum(done_by(first.show(job)).values()) == count


WORDS = """
import re
from collections import Counter
import grid

def count(file):
    with open(file, encoding="utf-8") as text:
        return Counter(re.findall(r"[a-z]+", text.read()))

totals = Counter()
for part in grid.map(count, grid.files("corpus/**/*.txt")):
    totals += part
for word, number in sorted(totals.items(), key=lambda item: (-item[1], item[0]))[:20]:
    print(word, number)
"""


def write_corpus(folder: Path, files: int, words: int) -> str:
    """Write text files; returns what the script must print."""
    rng = random.Random(7)
    vocabulary = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 4))) for _ in range(300)]
    totals: Counter[str] = Counter()
    for number in range(files):
        text = " ".join(rng.choices(vocabulary, k=words))
        path = folder / "corpus" / f"{number % 5}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        totals.update(re.findall(r"[a-z]+", text))
    best = sorted(totals.items(), key=lambda item: (-item[1], item[0]))[:20]
    return "".join(f"{word} {number}\n" for word, number in best)


def test_word_count_over_shipped_files(three: list[Peer]) -> None:
    expected = write_corpus(three[0].folder, files=120, words=20_000)
    done = three[0].job(WORDS, "--file", "corpus")
    assert (done.status, done.out) == (0, expected)
    shown = three[0].show("last")
    assert len([n for n in done_by(shown).values() if n]) >= 2, shown["peers"]
    again = three[0].job(WORDS, "--file", "corpus/**/*.txt")
    assert again.out == expected


def test_plain_python_and_submit_print_the_same(three: list[Peer]) -> None:
    peer = three[2]
    expected = write_corpus(peer.folder, files=10, words=1_000)
    done = peer.job(WORDS, "--file", "corpus")
    environment = peer.environment()
    command = [sys.executable, "job.py"]
    plain = subprocess.run(command, cwd=peer.folder, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert plain.stderr == ""
    assert (plain.returncode, plain.stdout) == (0, expected) == (done.status, done.out)


BIG_FILE = """
import hashlib
import grid

def digest(file, part):
    with open(file, "rb") as data:
        data.seek(part << 20)
        return hashlib.sha256(data.read(1 << 20)).hexdigest()

file = grid.files("big.bin")[0]
print(hashlib.sha256("".join(grid.map(digest, [file] * 40, range(40))).encode()).hexdigest())
"""


def test_large_input_reaches_every_peer_whole(three: list[Peer]) -> None:
    data = random.Random(3).randbytes(40 << 20)
    (three[0].folder / "big.bin").write_bytes(data)
    parts = [hashlib.sha256(data[i << 20 : (i + 1) << 20]).hexdigest() for i in range(40)]
    done = three[0].job(BIG_FILE, "--file", "big.bin")
    assert (done.status, done.out) == (0, hashlib.sha256("".join(parts).encode()).hexdigest() + "\n")


NUMPY = """
# /// script
# dependencies = ["numpy"]
# ///
import time
import numpy as np
import grid

def work(i):
    time.sleep(0.05)
    return (grid.context().peer, int(np.arange(i, dtype=np.int64).sum()), np.__version__ != "")

found = list(grid.map(work, range(120)))
print(sum(value for _, value, _ in found), len({peer for peer, _, _ in found}))
"""


@pytest.fixture(scope="module")
def numpy_job(three: list[Peer]) -> str:
    """The first job's stdout: each peer builds the environment for it."""
    done = three[0].job(NUMPY)
    assert done.status == 0, done.err
    return done.out


def test_declared_dependency_runs_on_all_peers(three: list[Peer], numpy_job: str) -> None:
    assert numpy_job.split()[0] == str(sum(sum(range(i)) for i in range(120)))
    done = three[1].job(NUMPY)  # environments are there: all take part at once
    assert (done.status, done.out) == (0, f"{numpy_job.split()[0]} 3\n")


def test_dependency_that_does_not_exist(three: list[Peer]) -> None:
    done = three[0].job("print('never')", "--with", "no-such-package-of-ours==1.0")
    assert (done.status, done.out) == (2, "")
    assert "no-such-package-of-ours" in done.error


def test_numpy_arrays_arrive_as_they_were(three: list[Peer], numpy_job: str) -> None:
    script = """
# /// script
# dependencies = ["numpy"]
# ///
import numpy as np
import grid

def add(a, b): return a + b
def total(ref, i): return float(ref[i].sum())

big = np.arange(4_000_000, dtype=np.float64).reshape(8, -1)
ref = grid.put(big)
print(sum(grid.map(total, [ref] * 8, range(8))) == float(big.sum()))
print(bool((grid.submit(add, big, big).result() == big * 2).all()))
"""
    done = three[0].job(script)
    assert (done.status, done.out) == (0, "True\nTrue\n"), done.err
