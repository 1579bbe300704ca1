"""Scripts as people write them, for the scenarios in which their leader dies at half time.

Each prints "half" when the first half of its tasks is done, and waits for a gate; each task keeps the diary. What a script prints
after that is known, whatever ran where and in which order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.e2e.survival import NOTE

HALF = (
    NOTE
    + """
def half():
    print("half", flush=True)
    while not os.path.exists(os.environ["GATE"]):
        time.sleep(0.05)

def noted(function):
    def work(key, *rest):
        note("+", key)
        time.sleep(0.02)
        value = function(key, *rest)
        note("-", key)
        return value
    return work
"""
)

@dataclass(frozen=True)
class Script:
    """A script, its arguments, what it prints, and which tasks can't but run again."""

    text: str
    out: str
    arguments: tuple[str, ...] = ()
    again: set[str] = field(default_factory=set)
    stderr: str = ""
    files: dict[str, str] = field(default_factory=dict)


ORDINARY = {
    "sets in globals": Script(
        """
NAMES = {"ash", "birch", "cedar", "elm", "fir", "oak", "pine", "yew"}
RARE = frozenset(name[::-1] for name in NAMES)
@noted
def work(i):
    return sorted(NAMES)[i % 8], len(RARE)
first = list(grid.map(work, range(20)))
half()
print(first[3], list(grid.map(work, range(20, 40)))[-1])
""",
        "('elm', 8) ('yew', 8)\n",
    ),
    "sets as arguments": Script(
        """
@noted
def work(i, names, table):
    return len(names) + len(table) + i
words = "the quick brown fox jumps over the lazy dog again and again".split()
first = sum(grid.map(work, range(20), [set(words[: i % 12]) for i in range(20)], [{w: {w} for w in words}] * 20))
half()
print(first, sum(grid.map(work, range(20, 40), [set(words)] * 20, [{}] * 20)))
""",
        "478 790\n",
    ),
    "classes of __main__": Script(
        """
import dataclasses, enum
class Kind(enum.Enum):
    RAW = 1
    DONE = 2
@dataclasses.dataclass
class Point:
    x: int
    kind: Kind = Kind.RAW
    tags: set = dataclasses.field(default_factory=set)
    def moved(self, by):
        return Point(self.x + by, Kind.DONE, self.tags | {"moved", str(by)})
@noted
def work(key, point):
    return point.moved(key)
points = list(grid.map(work, range(20), [Point(i) for i in range(20)]))
half()
points = list(grid.map(work, range(20, 40), points))
print(sum(p.x for p in points), all(isinstance(p, Point) and p.kind is Kind.DONE for p in points), sorted(points[3].tags))
""",
        "970 True ['23', '3', 'moved']\n",
    ),
    "threads that submit": Script(
        """
import threading
from concurrent.futures import ThreadPoolExecutor
@noted
def work(i):
    return i * i
def some(part):
    return sum(future.result() for future in [grid.submit(work, i) for i in range(part * 5, part * 5 + 5)])
with ThreadPoolExecutor(4) as pool:
    first = sum(pool.map(some, range(4)))
half()
found = []
threads = [threading.Thread(target=lambda part=part: found.append(some(part))) for part in range(4, 8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(first, sum(found))
""",
        "2470 18070\n",
    ),
    "unordered": Script(
        """
@noted
def work(i):
    time.sleep(0.03 * (i % 3))
    return i
@noted
def after(key, before):
    return before
last, found = 0, []
for value in grid.map_unordered(work, range(20)):
    last = grid.submit(after, f"after-{value}-{last}", last).result()  # depends on the order of all before it
    last = last * 31 % 1009 + value
    found.append(value)
half()
found += [value for value in grid.map_unordered(work, range(20, 40))]
print(sorted(found) == list(range(40)))
""",
        "True\n",
    ),
    "unordered, half read": Script(
        """
@noted
def work(i):
    return i * i
total = 0
for at, value in enumerate(grid.map_unordered(work, range(40))):
    total += value
    if at == 20:
        half()
print(total)
""",
        "20540\n",
    ),
    "generators": Script(
        """
import random
@noted
def work(i, x):
    return i if 0 <= x < 1 else -1
def numbers():
    for i in range(40):
        yield random.random()
total = 0
for at, value in enumerate(grid.map(work, range(40), numbers())):
    total += value
    if at == 20:
        half()
print(total, round(random.random(), 9) == round(random.random(), 9))
""",
        "780 False\n",
    ),
    "nested calls": Script(
        """
@noted
def leaf(key, x):
    return x * x
@noted
def branch(key, n):
    return sum(grid.map(leaf, [f"{key}.{i}" for i in range(n)], range(n)))
first = list(grid.map(branch, ["a", "b", "c", "d"], range(1, 5)))
half()
print(first, list(grid.map(branch, ["e", "f"], [5, 6])))
""",
        "[0, 1, 5, 14] [30, 55]\n",
    ),
    "argparse": Script(
        """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--times", type=int, default=1)
parser.add_argument("words", nargs="*")
options = parser.parse_args()
@noted
def work(key):
    return key.upper() * options.times
first = list(grid.map(work, options.words))
half()
print(first, list(grid.map(work, [word[::-1] for word in options.words])))
""",
        "['ONEONE', 'TWOTWO'] ['ENOENO', 'OWTOWT']\n",
        arguments=("--times", "2", "one", "two"),
    ),
    "logging": Script(
        """
import logging
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
logger = logging.getLogger("job")
@noted
def work(i):
    return i
logger.info("beginning")
first = sum(grid.map(work, range(20)))
logger.warning("so far %d", first)
half()
print(first + sum(grid.map(work, range(20, 40))))
logger.info("done")
""",
        "780\n",
        stderr="INFO done",
    ),
    "progress on stderr": Script(
        """
import sys
began = time.monotonic()
@noted
def work(i):
    return i
def shown(values, total):
    for at, value in enumerate(values, 1):
        print(f"\\r{at * 100 // total:3d}% {at}/{total} [{time.monotonic() - began:.3f} s]", end="", file=sys.stderr, flush=True)
        yield value
    print(file=sys.stderr)
first = sum(shown(grid.map(work, range(20)), 20))
half()
print(first + sum(shown(grid.map(work, range(20, 40)), 20)))
""",
        "780\n",
        stderr="100% 20/20",
    ),
    "output files": Script(
        """
@noted
def work(i):
    return f"line {i}\\n"
with grid.output("lines.txt").open("w") as file:
    for line in grid.map(work, range(20)):
        file.write(line)
    half()
    for line in grid.map(work, range(20, 40)):
        file.write(line)
with open("beside.txt", "w") as file:
    file.write("beside")
print("written")
""",
        "written\n",
        files={"output/lines.txt": "".join(f"line {i}\n" for i in range(40)), "beside.txt": "beside"},
    ),
    "refs and an executor": Script(
        """
from concurrent.futures import as_completed
@noted
def work(i, table):
    return table[i]
table = grid.put(list(range(100, 140)))
with grid.Executor() as pool:
    first = sum(future.result() for future in as_completed([pool.submit(work, i, table) for i in range(20)]))
half()
print(first + sum(grid.map(work, range(20, 40), [table] * 20)))
""",
        "4780\n",
    ),
    "exceptions": Script(
        """
class Odd(Exception):
    def __init__(self, i):
        super().__init__(f"{i} is odd")
        self.i = i
    def __reduce__(self):
        return Odd, (self.i,)
@noted
def work(i):
    if i % 2:
        note("-", i)
        raise Odd(i)
    return i
first = [x.i if isinstance(x, Odd) else -x for x in grid.map(work, range(20), return_exceptions=True)]
half()
try:
    grid.submit(work, 21).result()
except Odd as error:
    print(sum(first), error)
""",
        "10 21 is odd\n",
    ),
}

DIVERGENT = {
    "clock printed": Script(
        """
@noted
def work(i):
    return i
print(f"began {time.time():.6f}")
first = sum(grid.map(work, range(20)))
print(f"went on {time.time():.6f}")
half()
print("sum", first + sum(grid.map(work, range(20, 40))))
""",
        "sum 780\n",
    ),
    "clock as an argument": Script(
        """
@noted
def work(i, at):
    return i
stamps = [time.time() if i % 2 else 0.0 for i in range(20)]
first = sum(grid.map(work, range(20), stamps))
half()
print("sum", first + sum(grid.map(work, range(20, 40), [0.0] * 20)))
""",
        "sum 780\n",
        again={str(i) for i in range(1, 20, 2)},
    ),
}
