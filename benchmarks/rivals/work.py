"""What is measured: the same few functions for every engine, and the script that our side submits.

Two roles. As a module, an engine's process calls `MEASURES[row](engine, ...)`. As a script, `grid submit work.py ROW JSON` (or
`python work.py ROW JSON`) does the same with the grid's own calls and prints one JSON object a line: {"event": "values", ...}.

Rules: the standard library alone (numpy only by name, where the row says so: its user declares it with `--with`); every result
is checked, a wrong one fails the measurement; what is timed begins with the caller's call and ends with its last result.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

WORD = re.compile(rb"[A-Za-z0-9_]+")
Values = dict[str, Any]
PROBE = 100
"""Tasks by which an engine's speed is guessed before it is given as many as fit in the budget."""
ROUND_TRIPS_MIN = 20
SLOW_MAX = 10
"""An engine that is so many times slower than the ideal gets fewer tasks, so that it takes as long."""

# ---- tasks -------------------------------------------------------------------------------------------------------------


def increment(x: int) -> int:
    """The trivial task."""
    return x + 1


def increment_all(numbers: Sequence[int]) -> list[int]:
    """A chunk of trivial tasks, for engines whose users cut by hand."""
    return [increment(x) for x in numbers]


def apply_all(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """The same for any function."""
    return [function(item) for item in items]


def spin(seconds: float) -> float:
    """Keep a core busy for so long on the wall's clock."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return seconds


def spin_cpu(seconds: float) -> float:
    """Use so much of a core: who shares it with others takes longer."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return seconds


def nap(seconds: float) -> tuple[int, float]:
    """Sleep; return who did and when it began (all processes of a machine share that clock)."""
    began_s = time.monotonic()
    time.sleep(seconds)
    return os.getpid(), began_s


def nap_on_peer(seconds: float) -> tuple[str, float]:
    """The same, where processes of different peers may have the same number."""
    from grid import context

    pid, began_s = nap(seconds)
    return f"{context().peer}:{pid}", began_s


def block(number: int, size: int = 1_000_000) -> bytes:
    """A result of 1 MB."""
    return number.to_bytes(4, "big") * (size // 4)


def echo(data: bytes) -> bytes:
    """There and back."""
    return data


def checksum(array: Any) -> int:
    """Reads all of it."""
    return int(array.sum())


def count_words(files: Iterable[Any]) -> Counter[bytes]:
    """The words of some files: paths, or what `grid.files` gave."""
    words: Counter[bytes] = Counter()
    for file in files:
        data = Path(file).read_bytes() if isinstance(file, str) else file.read_bytes()
        words.update(WORD.findall(data))
    return words


# ---- engines -----------------------------------------------------------------------------------------------------------


class Calls:
    """What every engine can be asked for. An adapter overrides what its users would do otherwise.

    `submit` and `map` may raise NotImplementedError: the engine has no such call, and the row shows a dash.
    """

    workers = 2
    nap: Callable[[float], tuple[Any, float]] = staticmethod(nap)

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        """Hand out one call; returns what `result` takes."""
        raise NotImplementedError

    def result(self, handle: Any) -> Any:
        """Wait for one."""
        return handle.result()

    def gather(self, handles: Sequence[Any]) -> list[Any]:
        """Wait for many."""
        return [self.result(handle) for handle in handles]

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        """Results in order, of tasks that each take a while: one task an item."""
        raise NotImplementedError

    def map_quick(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        """The same for short tasks, where the engine has a call that batches them."""
        return self.map(function, items)

    def map_words(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        """Results in any order."""
        return self.map(function, items)

    def map_integers(self, count: int) -> dict[str, tuple[int, Callable[[], Iterable[int]]]]:
        """Ways to map `increment` over range(n): name → (n, what does it). A slow way takes a smaller n than `count`."""
        return {"map": (count, lambda: self.map(increment, range(count)))}

    def checksum(self, array: Any) -> int:
        """Send an array to a task as this engine's users should; return what the task says."""
        return int(self.result(self.submit(checksum, array)))

    def kill(self, pid: int, after_s: float) -> None:
        """Kill a worker a while from now, without waiting."""
        timer = threading.Timer(after_s, os.kill, (pid, 9))
        timer.daemon = True
        timer.start()

    def mark(self, name: str) -> None:
        """Tell who watches from outside where we are."""


class GridCalls(Calls):
    """Ours, inside the script."""

    nap = staticmethod(nap_on_peer)

    def __init__(self, workers: int) -> None:
        import grid

        self.grid = grid
        self.workers = workers

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.grid.submit(function, *args)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        return self.grid.map(function, items)

    def map_words(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        return self.grid.map_unordered(function, items)

    def kill(self, pid: int, after_s: float) -> None:
        say(event="kill", pid=pid, after_s=after_s)

    def mark(self, name: str) -> None:
        say(event="mark", name=name)


def say(**fields: Any) -> None:
    """One line for who submitted us."""
    print(json.dumps(fields), flush=True)


# ---- measures ----------------------------------------------------------------------------------------------------------


class WrongResult(Exception):
    """An engine returned something else than the serial program."""


def check(got: Any, wanted: Any, what: str) -> None:
    """Raises WrongResult."""
    if got != wanted:
        raise WrongResult(f"{what}: {got!r} instead of {wanted!r}")


def warm(calls: Calls) -> None:
    """Start all workers, and the function's first trip."""
    try:
        for _ in calls.map(calls.nap, [0.02] * (8 * calls.workers)):
            pass
    except NotImplementedError:
        calls.gather([calls.submit(calls.nap, 0.02) for _ in range(8 * calls.workers)])


def percentile(times: Sequence[float], percent: int) -> float:
    """Inclusive; of one sample itself."""
    return statistics.quantiles(times, n=100, method="inclusive")[percent - 1] if len(times) > 1 else times[0]


def round_trip(calls: Calls, *, count: int, budget_s: float) -> Values:
    """Submit one trivial task, wait for it, again and again."""
    warm(calls)
    times: list[float] = []

    def some(n: int, within_s: float) -> None:
        end = time.perf_counter() + within_s
        times.clear()
        for i in range(n):
            began = time.perf_counter()
            got = calls.result(calls.submit(increment, i))
            now = time.perf_counter()
            check(got, i + 1, "increment")
            times.append(now - began)
            if now > end and len(times) >= ROUND_TRIPS_MIN:
                break

    some(count // 10, budget_s / 10)
    some(count, budget_s)
    return {"p50_ms": 1e3 * statistics.median(times), "p99_ms": 1e3 * percentile(times, 99), "count": len(times)}


def submits(calls: Calls, *, count: int, budget_s: float) -> Values:
    """Submit trivial tasks one by one, then wait for all. Slow engines get as many as fit in the budget."""
    warm(calls)

    def some(n: int) -> float:
        began = time.perf_counter()
        handles = [calls.submit(increment, i) for i in range(n)]
        got = sum(calls.gather(handles))
        elapsed_s = time.perf_counter() - began
        check(got, n * (n + 1) // 2, "sum")
        return n / elapsed_s

    probe = min(count, PROBE)
    rate = some(probe)
    n = max(probe, min(count, int(rate * budget_s)))
    return {"per_s": some(n), "count": n}


def map_integers(calls: Calls, *, count: int) -> Values:
    """Map over small integers, every way the engine's users know; the best is what counts."""
    warm(calls)
    rates: dict[str, float] = {}
    for name, (n, mapped) in calls.map_integers(count).items():
        began = time.perf_counter()
        got = sum(mapped())
        elapsed_s = time.perf_counter() - began
        check(got, n * (n + 1) // 2, f"sum of {name}")
        rates[name] = n / elapsed_s
    best = max(rates, key=lambda name: rates[name])
    return {"per_s": rates[best], "best": best, "ways": rates}


def efficiency(calls: Calls, *, task_s: float, total_s: float, cpu: bool = False) -> Values:
    """Tasks that keep a core busy, all the same length: useful time over workers times elapsed time."""
    warm(calls)
    function = spin_cpu if cpu else spin
    count = max(2 * calls.workers, round(total_s * calls.workers / task_s))
    found: Values = {"count": count}

    def rate(run: Callable[[int], float], n: int) -> float:
        began = time.perf_counter()
        got = run(n)
        elapsed_s = time.perf_counter() - began
        check(round(got / task_s), n, "tasks")
        return n * task_s / (calls.workers * elapsed_s)

    ways: dict[str, Callable[[int], float]] = {
        "map": lambda n: sum(calls.map_quick(function, [task_s] * n)),
        "submit": lambda n: sum(calls.gather([calls.submit(function, task_s) for _ in range(n)])),
    }
    for name, way in ways.items():
        try:
            probed = rate(way, max(2 * calls.workers, count // 50))
        except NotImplementedError:
            continue
        found[name] = rate(way, min(count, max(2 * calls.workers, round(count * probed * SLOW_MAX))))
    return found


def array(calls: Calls, *, megabytes: int, count: int) -> Values:
    """Send a large array to a task, have its checksum back. Fresh contents each time; the first time apart."""
    numpy = importlib.import_module("numpy")
    warm(calls)
    size = megabytes << 20
    rates: list[float] = []
    local_s = 0.0
    for i in range(1 + count):
        data = numpy.arange(size // 8, dtype=numpy.uint64) * numpy.uint64(2 * i + 3)
        began = time.perf_counter()
        wanted = checksum(data)
        local_s = time.perf_counter() - began
        began = time.perf_counter()
        got = calls.checksum(data)
        rates.append(size / 1e6 / (time.perf_counter() - began))
        check(got, wanted, "checksum")
    return {"first_mb_s": rates[0], "mb_s": statistics.median(rates[1:]), "checksum_alone_mb_s": size / 1e6 / local_s}


def results(calls: Calls, *, count: int) -> Values:
    """1 MB each, to the caller."""
    warm(calls)
    began = time.perf_counter()
    total = 0
    for i, data in enumerate(calls.map(block, range(count))):
        total += len(data)
        if data[:4] != i.to_bytes(4, "big"):
            raise WrongResult(f"result {i}")
    elapsed_s = time.perf_counter() - began
    check(total, count * 1_000_000, "bytes")
    return {"mb_s": total / 1e6 / elapsed_s}


def batches(files: Iterable[Any], sizes: Iterable[int], batch_bytes: int) -> Iterator[list[Any]]:
    """Neighbouring files together."""
    batch: list[Any] = []
    total = 0
    for file, size in zip(files, sizes, strict=True):
        batch.append(file)
        total += size
        if total >= batch_bytes:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def corpus_files(folder: str) -> tuple[list[str], list[int]]:
    """Paths and sizes, in order."""
    found = sorted((entry.path, entry.stat().st_size) for entry in walk(folder))
    return [path for path, _ in found], [size for _, size in found]


def walk(folder: str) -> Iterator[os.DirEntry[str]]:
    """The files below."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from walk(entry.path)
            elif entry.is_file(follow_symlinks=False):
                yield entry


def told(words: Counter[bytes]) -> str:
    """What engines must agree on."""
    top = sorted(words.items(), key=lambda item: (-item[1], item[0]))[:10]
    return f"{words.total()} {len(words)} " + " ".join(f"{word.decode()}={times}" for word, times in top)


def words(calls: Calls, *, corpus: str, batch_bytes: int, files: bool = False) -> Values:
    """Count a corpus' words: the same batches for all. `files`: the job's own inputs (`--file`), not paths of this machine."""
    warm(calls)
    began = time.perf_counter()
    paths: Sequence[Any]
    if files:
        given = importlib.import_module("grid").files(corpus)
        paths, sizes = given, [file.size for file in given]
    else:
        paths, sizes = corpus_files(corpus)
    total: Counter[bytes] = Counter()
    for counted in calls.map_words(count_words, list(batches(paths, sizes, batch_bytes))):
        total.update(counted)
    return {"s": time.perf_counter() - began, "check": told(total), "megabytes": sum(sizes) / 1e6, "files": len(sizes)}


def killed(calls: Calls, *, seconds: float, task_s: float) -> Values:
    """The same job twice; in the second a worker is killed at half time. What it costs, in seconds."""
    warm(calls)
    count = round(seconds * calls.workers / task_s)

    def run() -> tuple[float, list[Any]]:
        began = time.perf_counter()
        done = list(calls.map(calls.nap, [task_s] * count))
        elapsed_s = time.perf_counter() - began
        check(len(done), count, "results")
        return elapsed_s, done

    unharmed_s, done = run()
    victim = done[-1][0]
    at_s = time.monotonic() + seconds / 2
    calls.kill(int(str(victim).rpartition(":")[2]), seconds / 2)
    harmed_s, done = run()
    if any(who == victim and began_s > at_s + seconds / 5 for who, began_s in done):
        raise WrongResult("nobody was killed")
    return {"extra_s": harmed_s - unharmed_s, "unharmed_s": unharmed_s, "harmed_s": harmed_s}


def many_workers(calls: Calls, *, seconds: float, task_s: float, began_s: float | None = None) -> Values:
    """Sleeps on many workers, from one map, nothing warmed: how busy, and when the last worker began its first task.

    `began_s`: when the user pressed Enter (monotonic clock).
    """
    count = round(seconds * calls.workers / task_s)
    mapped_s = time.monotonic()
    firsts: dict[Any, float] = {}
    done = 0
    for who, at_s in calls.map(calls.nap, [task_s] * count):
        firsts[who] = min(at_s, firsts.get(who, at_s))
        done += 1
    starts = sorted(firsts.values())
    mapped_s = min(mapped_s, starts[0])  # where another leader ran this script again, tasks began before it did
    elapsed_s = time.monotonic() - mapped_s
    check(done, count, "results")
    found: Values = {"efficiency": count * task_s / (calls.workers * elapsed_s), "workers": len(starts), "count": count}
    if len(starts) >= calls.workers:
        found["busy_s"] = starts[calls.workers - 1] - mapped_s
        if began_s is not None:
            found["busy_since_submit_s"] = starts[calls.workers - 1] - began_s
    return found


def tasks(calls: Calls, *, counts: Sequence[int], repeats: int = 3) -> Values:
    """Trivial tasks through map, more and more. A rate each, the median of a few where that is quick."""
    warm(calls)
    rates: dict[str, float] = {}
    for n in counts:
        calls.mark(f"begin {n}")
        times = []
        for _ in range(repeats if n < 1_000_000 else 1):
            began = time.perf_counter()
            got = sum(calls.map(increment, range(n)))
            times.append(time.perf_counter() - began)
            check(got, n * (n + 1) // 2, "sum")
        calls.mark(f"end {n}")
        rates[str(n)] = n / statistics.median(times)
    return {"rates": rates, "flatness": min(rates.values()) / max(rates.values())}


def submit_counts(calls: Calls, *, counts: Sequence[int]) -> Values:
    """The same through submit."""
    return {"rates": {str(n): submits(calls, count=n, budget_s=60.0)["per_s"] for n in counts}}


def payloads(calls: Calls, *, sizes: Sequence[int], total_bytes: int, count_max: int) -> Values:
    """Arguments and results of some size, there and back: seconds a task and MB/s each way."""
    warm(calls)
    found: Values = {}
    for size in sizes:
        count = max(4, min(count_max, total_bytes // max(size, 1)))
        began = time.perf_counter()
        data: Any = (i.to_bytes(4, "big") * (size // 4 or 1) for i in range(count))
        total = sum(len(back) for back in calls.map(echo, data))
        elapsed_s = time.perf_counter() - began
        check(total, count * 4 * (size // 4 or 1), "bytes")
        found[str(size)] = {"count": count, "s_per_task": elapsed_s / count, "mb_s": total / 1e6 / elapsed_s}
    return {"sizes": found}


def sent(calls: Calls, *, megabytes: int, count: int) -> Values:
    """A blob that a task on another peer reads: put, fetched, verified, mapped."""
    grid = importlib.import_module("grid")
    warm(calls)
    rates = []
    for i in range(1 + count):
        data = os.urandom(1 << 20) * megabytes
        began = time.perf_counter()
        got = calls.result(calls.submit(len, grid.put(data)))
        rates.append(len(data) / 1e6 / (time.perf_counter() - began))
        check(got, len(data), f"length {i}")
    return {"first_mb_s": rates[0], "mb_s": statistics.median(rates[1:])}


def idle(calls: Calls) -> Values:
    """Start all workers, say who they are, and wait until we are told to end."""
    warm(calls)
    pids = sorted({int(str(who).rpartition(":")[2]) for who, _ in calls.map(calls.nap, [0.05] * (8 * calls.workers))})
    say(event="idle", pids=pids)
    time.sleep(3600)
    return {}


def first(calls: Calls) -> Values:
    """The first result of a cold start."""
    check(calls.result(calls.submit(increment, 1)), 2, "increment")
    return {}


MEASURES: dict[str, Callable[..., Values]] = {
    each.__name__: each
    for each in (
        round_trip, submits, map_integers, efficiency, array, results, words, killed, many_workers, tasks,
        submit_counts, payloads, sent, idle, first,
    )
}  # fmt: skip


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """For engines whose users cut by hand."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def main() -> None:
    """As a script: ROW JSON."""
    row, params = sys.argv[1], json.loads(sys.argv[2])
    workers = params.pop("workers")
    try:
        values = MEASURES[row](GridCalls(workers), **params)
    except Exception as error:
        say(event="error", message=f"{type(error).__name__}: {error}")
        raise
    say(event="values", values=values)


if __name__ == "__main__":
    main()
