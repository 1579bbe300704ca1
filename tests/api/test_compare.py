"""What is the same although its bytes differ, and what is not."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import functools
import sys
import types
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any

import pytest

from grid.api import compare, serialize, wire
from grid.api.refs import Ref


@dataclasses.dataclass
class Loose:
    """Equal to whatever."""

    value: int

    def __eq__(self, other: object) -> bool:
        return True


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self, a: Any) -> None:
        self.a = a


class Refuses:
    def __init__(self, at: str) -> None:
        self.at = at

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state)
        if self.at == "load":
            raise ValueError(self.at)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if vars(self).pop("now", None):
            raise ValueError(self.at)
        return super().__reduce_ex__(protocol)


def segment(items: list[Any], kind: int = serialize.ONE) -> bytes:
    return b"".join(bytes(part) for part in serialize.dump_segment(items, kind)[0])


def same(old: list[Any], new: list[Any], first: int = 0, kind: int = serialize.ONE) -> tuple[tuple[int, int], ...]:
    one, other = segment(old, kind), segment(new, kind)
    return compare.same_items(wire.Compare(1, 0, first, len(new), len(one)), one + other)


SHARED: list[Any] = ["shared"]
LOOP: list[Any] = [1]
LOOP.append(LOOP)
LOOP_TWO: list[Any] = [1, [1]]
LOOP_TWO[1].append(LOOP_TWO)

ALIKE: list[tuple[Any, Any]] = [
    ({"a", "b", "c"}, {"c", "b", "a"}),
    ({None, int, len}, {len, None, int}),
    (("ab" * 3, "ab" * 3), ("ab" * 3, "".join(["ab"] * 3))),
    (float("nan"), float("nan")),
    ([1, {"k": (2.5, b"x")}], [1, {"k": (2.5, b"x")}]),
    (LOOP, LOOP),
    (Slotted([1]), Slotted([1])),
    (Loose(1), Loose(1)),
    (Colour.RED, Colour.RED),
    (datetime.date(2020, 1, 2), datetime.date(2020, 1, 2)),
    (collections.OrderedDict(a=1), collections.OrderedDict(a=1)),
    (collections.Counter("ab"), collections.Counter("ab")),
    (PurePosixPath("a/b"), PurePosixPath("a/b")),
    (Decimal("1.0"), Decimal("1.0")),
    (functools.partial(pow, 2), functools.partial(pow, 2)),
    (Ref("aa", 3), Ref("aa", 3)),
    (bytearray(b"x"), bytearray(b"x")),
    ("x".upper, "x".upper),
]
DIFFERENT: list[tuple[Any, Any]] = [
    (1, 2),
    (1, True),
    (1, 1.0),
    (0.0, -0.0),
    ([1], (1,)),
    ([1], [True]),
    ({1}, {True}),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ([SHARED, SHARED], [SHARED, ["shared"]]),
    ([SHARED, ["shared"]], [SHARED, SHARED]),
    (LOOP, LOOP_TWO),
    (Slotted([1]), Slotted([2])),
    (Loose(1), Loose(2)),
    (Colour.RED, Colour.BLUE),
    (datetime.date(2020, 1, 2), datetime.date(2020, 1, 3)),
    (collections.OrderedDict(a=1), {"a": 1}),
    (collections.Counter("ab"), collections.Counter("aab")),
    (Decimal("1.0"), Decimal("1.00")),
    (functools.partial(pow, 2), functools.partial(pow, 3)),
    (Ref("aa", 3), Ref("ab", 3)),
    (bytearray(b"x"), b"x"),
]


@pytest.mark.parametrize(("old", "new"), ALIKE)
def test_alike(old: Any, new: Any) -> None:
    assert same([old], [new]) == ((0, 1),)


@pytest.mark.parametrize(("old", "new"), DIFFERENT)
def test_different(old: Any, new: Any) -> None:
    assert same([old], [new]) == ()


def test_arrays() -> None:
    numpy = pytest.importorskip("numpy")
    for make in (lambda n: numpy.arange(n), lambda n: numpy.arange(2 * n)[::2], lambda n: numpy.float64(n)):
        assert same([make(50), make(50)], [make(50), make(51)]) == ((0, 1),)
    array = numpy.arange(5)
    assert same([array], [array.astype("int32")]) == ()


def test_ranges_of_the_same_items_count_from_the_first() -> None:
    old = [(0,), (1,), (2,), (3,), (4,)]
    new = [(0,), (9,), (2,), (3,), (9,)]
    assert same(old, new, first=100) == ((100, 101), (102, 104))
    calls = [((n,), None) for n in range(3)]
    assert same(calls, calls, kind=serialize.CALL) == ((0, 3),)


def test_what_raises_or_is_too_long_is_different(monkeypatch: pytest.MonkeyPatch) -> None:
    assert same([Refuses("load"), 1], [Refuses("load"), 1]) == ()
    late = Refuses("reduce")
    assert same([[late]], [[late]]) == ((0, 1),)
    vars(late)["now"] = True
    comparison = compare._alike([late], [Refuses("reduce")], {}, {})
    assert not comparison
    good = segment([1])
    message = wire.Compare(1, 0, 0, 1, len(good))
    assert compare.same_items(message, good + b"garbage") == ()
    assert compare.same_items(wire.Compare(1, 0, 0, 2, len(good)), good + good) == ()
    assert compare.same_items(message, good + segment([1], serialize.MANY)) == ()
    deep: Any = ()
    for _ in range(compare.DEPTH_MAX + 10):
        deep = [deep]
    assert same([deep], [deep]) == ()
    monkeypatch.setattr(compare, "BYTES_MAX", 2 * len(good) - 1)
    assert compare.same_items(message, good + good) == ()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], types.ModuleType]]:
    """Run a script as `__main__`, a new one at each call."""

    def run(source: str) -> types.ModuleType:
        module = types.ModuleType("__main__")
        monkeypatch.setitem(sys.modules, "__main__", module)
        exec(source, module.__dict__)
        return module

    serialize.set_namespace("job")
    yield run
    serialize.set_namespace("")


def same_function(old: Any, new: Any) -> bool:
    one, other = serialize.dump_function(old), serialize.dump_function(new)
    return compare.same_function(wire.CompareFunction(1, len(one)), one + other)


FUNCTION = """
import math
WORDS = {"a", "b", None}
class Kind:
    limit = 3
def helper(x): return x + 1
def f(x, y=(1, 2), *, z=None):
    def inner(): return helper(x), WORDS, math.pi
    return inner, Kind.limit
def outer(n):
    return lambda x: x + n
"""


def test_function_is_the_same_if_code_and_captures_are(script: Callable[[str], types.ModuleType]) -> None:
    old, new = script(FUNCTION), script(FUNCTION.replace('{"a", "b", None}', '{None, "b", "a"}'))
    assert same_function(old.outer(3), new.outer(3))
    assert not same_function(old.outer(3), new.outer(4))
    assert not same_function(old.helper, new.outer)
    new.f.__globals__["Kind"] = old.Kind  # the driver has one class of that name
    assert same_function(old.f, new.f)
    for change in ("x + 1", "x + 2"), ("y=(1, 2)", "y=(1, 3)"), ("z=None", "z=0"), ('"b", None', '"c", None'):
        other = script(FUNCTION.replace(*change))
        other.f.__globals__["Kind"] = old.Kind
        assert not same_function(old.f, other.f), change


def test_state_of_a_class_counts(script: Callable[[str], types.ModuleType]) -> None:
    """The driver's own class stays as it is: what the pickles say of it is compared."""
    module = script(FUNCTION)
    kind = module.Kind
    before = segment([kind()]), serialize.dump_function(module.f)
    kind.limit = 4
    after = segment([kind()]), serialize.dump_function(module.f)
    kind.limit = 5
    message = wire.Compare(1, 0, 0, 1, len(before[0]))
    assert compare.same_items(message, before[0] + after[0]) == ()
    assert compare.same_items(message, before[0] + before[0]) == ((0, 1),)
    question = wire.CompareFunction(1, len(before[1]))
    assert not compare.same_function(question, before[1] + after[1])
    assert compare.same_function(question, before[1] + before[1])
    assert kind.limit == 5
