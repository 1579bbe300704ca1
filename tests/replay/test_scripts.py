"""Ordinary scripts, run anew on another machine: they declare the same bytes, so that nothing runs twice (real processes)."""

from __future__ import annotations

import compileall
from pathlib import Path

import pytest

from tests.replay.conftest import Play
from tests.replay.leader import Run

pytestmark = pytest.mark.real

PRELUDE = """
import grid
"""

ORDERED = {
    "sets_of_strings": """
WORDS = {f"word{n}" for n in range(200)}
TABLE = {word: {word[:4], word[-2:]} for word in sorted(WORDS)}
def look(word): return word in WORDS, sorted(TABLE[word])
print(list(grid.map(look, sorted(WORDS))))
print(list(grid.map(lambda items: sorted(items), [set(WORDS), frozenset(list(WORDS)[:50])])))
""",
    "classes_of_main": """
import abc, dataclasses, enum, typing
from collections import namedtuple
T = typing.TypeVar("T")
class Colour(enum.Enum):
    RED = 1
    BLUE = "b"
class Flags(enum.Flag):
    A = 1
    B = 2
@dataclasses.dataclass(order=True)
class Point:
    x: int
    y: list = dataclasses.field(default_factory=list)
    def moved(self, by): return Point(self.x + by, [*self.y, by])
class Base(abc.ABC):
    @abc.abstractmethod
    def name(self): ...
class Box(Base, typing.Generic[T]):
    kinds = {"a", "b", "c"}
    __slots__ = ("value",)
    def __init__(self, value: T): self.value = value
    def name(self): return type(self).__name__ + str(sorted(self.kinds))
    def grown(self): return Box((self.value, Point(1)))
Pair = namedtuple("Pair", "left right")
class Odd(Exception): pass
def step(item):
    if isinstance(item, Point): return item.moved(2)
    if isinstance(item, Box): return item.grown()
    return Pair(item, Flags.A | Flags.B)
first = list(grid.map(step, [Point(1), Box(2), Colour.BLUE, Flags.A, Pair(1, 2)]))
second = list(grid.map(step, first))  # instances that came back travel again
print(second[0], second[1].name(), second[1].value[0][0], second[2:])
def fail(x): raise Odd(x)
try: list(grid.map(fail, [Point(3)]))
except Odd as error: print("odd", error.args)
""",
    "closures_partials_methods_recursion": """
import functools, operator
def power(n):
    def inner(x): return x ** n if n else deeper(x)
    return inner
def deeper(x): return 1 if x < 2 else x * deeper(x - 1)
class Scale:
    def __init__(self, by): self.by = by
    def __call__(self, x): return x * self.by
    def times(self, x): return self(x)
    @classmethod
    def of(cls, x): return cls(x).by
    @staticmethod
    def plain(x): return -x
def logged(function):
    @functools.wraps(function)
    def wrapper(*args): return function.__name__, function(*args)
    return wrapper
@logged
def decorated(x): return x + 1
for function in (power(2), power(0), lambda x: x + 1, Scale(3), Scale(4).times, Scale.of, Scale.plain, decorated,
                 functools.partial(pow, 2), functools.partial(operator.add, 5), str.upper if False else abs):
    print(list(grid.map(function, range(5))))
print(list(grid.map(lambda a, b: a * b, range(10), (x / 3 for x in range(10)))))
""",
    "stdlib_code_by_value": """
import contextlib, collections, dataclasses, functools, reprlib
@contextlib.contextmanager
def managed(x):
    yield x * 2
@functools.lru_cache(maxsize=None)
def cached(x): return x + 1
@dataclasses.dataclass
class Tree:
    left: "Tree | None" = None
    size: int = 0
def use(x):
    with managed(x) as twice:
        return repr(Tree(Tree(), twice)), collections.Counter("aab").most_common(1)
print(list(grid.map(use, range(5))))
""",
    "captured_paths": """
import os
from pathlib import Path
HERE = Path(__file__).parent
FOLDER = os.path.dirname(os.path.abspath(__file__))
def read(name):
    own = Path(__file__).name
    return own, (HERE / name).read_text(), open(os.path.join(FOLDER, name)).read(), FOLDER == str(HERE)
print(list(grid.map(read, ["data.txt"] * 3)))
def nested(base=None):
    folder = os.path.join(FOLDER)
    return lambda name: open(os.path.join(folder, name)).read()
print(list(grid.map(nested(), ["data.txt"])))
""",
    "local_modules": """
import helper, package.part
from package import part
print(list(grid.map(helper.double, range(5))))
print(list(grid.map(helper.make(3), range(5))))
def both(x): return part.half(x), package.part.half(x), helper.WORDS, helper.Thing(x).x
print(list(grid.map(both, range(5))))
print([thing.x for thing in grid.map(helper.Thing, range(5))])
""",
    "slow_generator": """
import time
def numbers():
    for n in range(60):
        if n % 20 == 7: time.sleep(0.03)
        yield n
def words():
    for n in range(60):
        if n % 20 == 7: time.sleep(0.03)
        yield (n, "w" * n)
print(sum(grid.map(lambda n: n * n, numbers())))
print(sum(grid.map(lambda pair: len(pair[1]), words())))
def mixed():
    for n in range(40):
        time.sleep(0.002)
        yield n if n % 3 else (None if n % 2 else str(n))
print(list(grid.map(repr, mixed())))
""",
    "many_cheap_items": """
print(sum(grid.map(lambda x: x, range(100_000))))
print(sum(grid.map(lambda x: x, list(range(50_000)))))
print(sum(grid.map(lambda x: x, tuple(range(30_000)))))
print(sum(grid.map(len, [("x" * (n % 50), n) for n in range(20_000)])))
print(sum(grid.map(lambda x: x % 7, (x * x for x in range(60_000)))))
print(sum(grid.map(lambda x: 1, (10 ** (x % 300) for x in range(30_000)))))
print(sum(grid.map(lambda x: 1, {f"k{n}": n for n in range(5_000)})))
""",
    "results_feed_arguments": """
def make(x): return {"key": f"value{x % 3}", "list": [f"value{x % 3}"] * 2}
made = list(grid.map(make, range(300)))
print(len(list(grid.map(len, made))), len(list(grid.map(lambda pair: pair, zip(made, reversed(made))))))
""",
    "refs_and_files": """
table = grid.put({f"k{n}": n for n in range(1000)})
print(sum(grid.map(lambda key, table: table[key], (f"k{n}" for n in range(50)), [table] * 50)))
print(sum(grid.map(lambda n: table.get()[f"k{n}"], range(50))))
""",
    "random_and_seed": """
import random
values = [random.random() for _ in range(100)]
random.shuffle(values)
print(sum(grid.map(lambda x: x * 2, values)))
print(list(grid.map(lambda x: (x, random.random(), grid.context().seed), [random.randrange(10) for _ in range(5)])))
""",
    "nested_calls": """
def inner(x): return x + 1
def outer(x): return sum(grid.map(inner, range(x))) + grid.submit(inner, x).result()
print(list(grid.map(outer, range(6))))
""",
    "argparse_logging_progress": """
import argparse, logging, sys, warnings
parser = argparse.ArgumentParser()
parser.add_argument("--count", type=int, default=3)
parser.add_argument("--flag", action="store_true")
args = parser.parse_args()
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
log = logging.getLogger("job")
try:
    from tqdm import tqdm
except ImportError:
    def tqdm(iterable, total=None):
        for done, item in enumerate(iterable, 1):
            print(f"\\r{done}/{total}", end="", file=sys.stderr, flush=True)
            yield item
        print(file=sys.stderr)
def work(x):
    log.info("in a task %d", x)
    return x * args.count, args.flag
log.info("begin")
warnings.warn("careful")
for result in tqdm(grid.map(work, range(20)), total=20):
    log.debug("%s", result)
print(args, result)
""",
}

NUMPY = """
import random, numpy
random.seed(3)
from numpy import random as generators
print(random.random(), generators.random(), generators.randint(1000))
TABLE = numpy.arange(1000.0)
names = numpy.array(["a", "bb"])
print(sum(grid.map(lambda x: float(TABLE[x]), numpy.arange(500))))
print(list(grid.map(lambda row: row.sum(), numpy.ones((300, 5000))))[-1])
print(list(grid.map(numpy.sum, [numpy.arange(n) for n in range(50)])), list(grid.map(str, names)))
print([len(x) for x in grid.map(lambda x: x, (numpy.full(20_000, n) for n in range(5)))])
print(list(grid.map(lambda x: (x, float(generators.random())), generators.random(5))))
"""

MODULES = {
    "data.txt": "some data",
    "helper.py": """
WORDS = frozenset({"one", "two", "three"})
LIST = ["a" * 3, "a" * 3, ("x", "y"), ("x", "y")]
def double(x): return x * 2
def make(n):
    def inner(x): return x * n, LIST, sorted(WORDS)
    return inner
class Thing:
    def __init__(self, x): self.x = x
""",
    "package/__init__.py": "",
    "package/part.py": "def half(x): return x / 2\n",
}


@pytest.mark.parametrize("name", ORDERED)
async def test_script_declares_the_same_bytes_and_nothing_runs_again(play: Play, name: str) -> None:
    argv = ("--count", "5", "--flag") if name.startswith("argparse") else ()
    first = await play(PRELUDE + ORDERED[name], modules=MODULES, argv=argv)
    assert len(first.maps) > 0
    again = await play(PRELUDE + ORDERED[name], first, modules=MODULES, argv=argv)
    assert again.stdout == first.stdout
    assert again.reruns == []
    assert again.maps == first.maps
    assert again.items == first.items


async def test_numpy(play: Play) -> None:
    pytest.importorskip("numpy")
    first = await play(PRELUDE + NUMPY, packages=True)
    again = await play(PRELUDE + NUMPY, first, packages=True)
    assert again.stdout == first.stdout
    assert again.reruns == []
    assert again.maps == first.maps
    assert len(first.maps) == 6


async def test_compiled_modules_beside_the_script_are_no_difference(play: Play) -> None:
    def compile_modules(run: Run) -> None:
        folder = Path(run.setup.script).parent
        assert compileall.compile_dir(folder, quiet=2)
        assert (folder / "package" / "__pycache__").exists()

    first = await play(PRELUDE + ORDERED["local_modules"], modules=MODULES)
    again = await play(PRELUDE + ORDERED["local_modules"], first, modules=MODULES, prepare=compile_modules)
    assert again.reruns == []
    assert again.maps == first.maps
