"""Scripts whose course depends on which result comes first: with recorded results in the recorded order they repeat it."""

from __future__ import annotations

import pytest

from tests.replay.conftest import Play

pytestmark = pytest.mark.real

JITTER = """
import grid, random, time
def work(x):
    time.sleep(random.random() * 0.01)
    return x * x
"""

ONE_THREAD = {
    "map_unordered_feeds_a_map": """
found = []
for result in grid.map_unordered(work, range(40)):
    found.append(result)
print(found)
print(list(grid.map(work, found)))
""",
    "map_unordered_feeds_a_generator": """
print(list(grid.map(work, (x + 1 for x in grid.map_unordered(work, range(40))))))
""",
    "stages_side_by_side": """
left, right = grid.map_unordered(work, range(20)), grid.map_unordered(lambda x: work(x + 100), range(20))
pairs = list(zip(left, right))
print(pairs)
print(list(grid.map(lambda pair: work(pair[0] + pair[1]), pairs)))
""",
    "submit_as_completed": """
from concurrent.futures import as_completed, wait, FIRST_COMPLETED
order = [future.result() for future in as_completed([grid.submit(work, x) for x in range(30)])]
print(order, list(grid.map(work, order)))
pending, order = {grid.submit(work, x) for x in range(5)}, []
while pending:
    done, pending = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        order.append(future.result())
        if len(order) < 25: pending.add(grid.submit(work, future.result() % 97 + 1))
print(order, list(grid.map(work, order)))
done, _ = wait([grid.submit(work, x) for x in range(20)])
print(list(grid.map(work, [future.result() for future in done])))
""",
    "submit_lambdas_partials_and_state": """
import functools
futures = [grid.submit(lambda y, x=x: work(x + y), 5) for x in range(12)]
futures += [grid.submit(functools.partial(pow, x), 2) for x in range(12)]
state = {"n": 0}
def stateful(x): return state["n"] + work(x)
for n in range(12):
    state["n"] = n * 1000
    futures.append(grid.submit(stateful, n))
    if n % 3 == 0: futures[-1].result()
print([future.result() for future in futures])
""",
    "executor": """
import dataclasses
@dataclasses.dataclass(frozen=True)
class Key:
    name: str
def keyed(key, *, times=1): return Key(key.name * times), {key.name: work(times)}
with grid.Executor() as pool:
    futures = [pool.submit(keyed, Key(f"k{n}"), times=n % 3) for n in range(30)]
    print(list(pool.map(work, range(20))))
    print([future.result() for future in futures])
""",
    "failures_and_callbacks": """
import threading
class Wrong(Exception): pass
def odd(x):
    if x % 3 == 0: raise Wrong(x)
    return work(x)
values = list(grid.options(retries=0).map_unordered(odd, range(20), return_exceptions=True))
print([value if isinstance(value, int) else value.args for value in values])
futures = [grid.submit(odd, x) for x in range(20)]
errors = [future.exception() for future in futures]
print([error and error.args for error in errors])
""",
}

THREADS = {
    "threads_submit": """
import threading
class Item:
    def __init__(self, x): self.x = x
class Other(Item): pass
def take(item, again=0): return type(item).__name__, work(item.x) + again
def run(k, out):
    kind = Item if k % 2 else Other
    out[k] = [grid.submit(take, kind(k * 100 + n), again=n).result() for n in range(15)]
out = {}
threads = [threading.Thread(target=run, args=(k, out)) for k in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(sorted(out.items()))
""",
    "thread_pool_submits_and_waits": """
from concurrent.futures import ThreadPoolExecutor
def one(n):
    first = grid.submit(work, n).result()
    return grid.submit(work, first).result() + sum(grid.map(work, [n, n + 1]))
with ThreadPoolExecutor(5) as pool:
    print(list(pool.map(one, range(25))))
""",
}


@pytest.mark.parametrize("name", ONE_THREAD)
async def test_recorded_order_repeats_the_run(play: Play, name: str) -> None:
    first = await play(JITTER + ONE_THREAD[name], workers=3)
    again = await play(JITTER + ONE_THREAD[name], first)
    assert again.stdout == first.stdout
    assert again.reruns == []
    assert again.maps == first.maps
    assert again.items == first.items


@pytest.mark.parametrize("name", THREADS)
async def test_threads_make_the_same_calls_in_whatever_order(play: Play, name: str) -> None:
    first = await play(JITTER + THREADS[name], workers=3)
    assert sum(first.items.values()) > 40
    again = await play(JITTER + THREADS[name], first)
    assert again.stdout == first.stdout
    assert again.reruns == []
    assert again.items == first.items
    assert sorted(map(repr, again.maps)) == sorted(map(repr, first.maps))
