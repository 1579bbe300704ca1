"""Segments, functions, exceptions."""

from __future__ import annotations

import ast
import dataclasses
import sys
import threading
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.api import serialize
from grid.api.refs import Ref

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4) | st.tuples(inner),
    max_leaves=10,
)


def joined(parts: list[serialize.Buffer]) -> bytes:
    return b"".join(bytes(part) for part in parts)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A user's script as `__main__`: its classes exist in this process alone."""
    module = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    serialize.set_namespace("job")
    exec(
        "import dataclasses, enum\n"
        "@dataclasses.dataclass\n"
        "class Point:\n    x: int\n    def double(self): return Point(self.x * 2)\n"
        "class Colour(enum.Enum):\n    RED = 1\n"
        "class Odd(Exception):\n    pass\n"
        "def make(x): return Point(x)\n",
        module.__dict__,
    )
    yield module
    serialize.set_namespace("")


@given(st.lists(VALUES, max_size=50), st.integers(0, 50), st.integers(0, 50))
def test_segment_round_trip_whole_and_in_part(values: list[Any], lo: int, length: int) -> None:
    data = joined(serialize.dump_segment(values)[0])
    assert len(data) % serialize.ALIGNMENT == 0
    assert list(serialize.load_segment(data).items) == values
    assert list(serialize.load_segment(data, lo, lo + length).items) == values[lo : lo + length]


@given(st.binary(max_size=300))
def test_segment_garbage_is_an_error(data: bytes) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - unpickling garbage raises what it likes, but raises
        serialize.load_segment(data)
    good = joined(serialize.dump_segment([1, [2]])[0])
    with pytest.raises(serialize.SegmentError):
        serialize.load_segment(b"xx" + good[2:])


def test_segment_kinds_call_as_they_should() -> None:
    def spread(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return args, kwargs

    for kind, item, result in (
        (serialize.ONE, (1, 2), (((1, 2),), {})),
        (serialize.MANY, (1, 2), ((1, 2), {})),
        (serialize.CALL, ((1, 2), None), ((1, 2), {})),
        (serialize.CALL, ((1,), {"b": 2}), ((1,), {"b": 2})),
    ):
        segment = serialize.load_segment(joined(serialize.dump_segment([item], kind)[0]))
        assert segment.bind(spread)(segment.items[0]) == result


def test_segment_values_are_frozen_when_added() -> None:
    writer = serialize.SegmentWriter()
    box = [1]
    writer.add(box)
    box.append(2)
    writer.add(box)
    assert serialize.load_results(joined(writer.finish()[0])) == [[1], [1, 2]]


def test_large_buffers_lie_outside_aligned_and_are_used_in_place(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(100_000.0)
    fixed = array.copy()
    fixed.flags.writeable = False
    parts, _ = serialize.dump_segment(["a", array, fixed, array[:5]])
    assert any(type(part) is memoryview and part.nbytes == array.nbytes for part in parts), "the array was copied"
    path = tmp_path / "segment"
    path.write_bytes(joined(parts))
    items = serialize.load_segment(serialize.map_file(str(path))).items
    assert [bool((items[n] == array).all()) for n in (1, 2)] == [True, True]
    assert items[1].ctypes.data % serialize.ALIGNMENT == 0
    assert (items[1].flags.writeable, items[2].flags.writeable) == (True, False)
    items[1][0] = 5
    assert serialize.load_segment(path.read_bytes()).items[1][0] == 0
    shared = serialize.load_segment(serialize.map_file(str(path), private=False)).items
    assert not shared[1].flags.writeable


def test_large_bytes_are_not_copied_on_the_way_out() -> None:
    data = bytes(1_000_000)
    parts, _ = serialize.dump_segment([data])
    assert any(part is data for part in parts)
    assert serialize.load_results(joined(parts)) == [data]


def test_numpy_slice_among_other_chunks() -> None:
    numpy = pytest.importorskip("numpy")
    writer = serialize.SegmentWriter()
    writer.add("first")
    writer.add_batch(numpy.arange(5))
    assert list(serialize.load_results(joined(writer.finish()[0]))) == ["first", 0, 1, 2, 3, 4]


def test_script_classes_travel_by_value_once_a_segment(script: types.ModuleType) -> None:
    data = joined(serialize.dump_segment([script.Point(x) for x in range(100)])[0])
    assert data.count(b"Point") < 20
    again = joined(serialize.dump_segment([script.Point(1), script.Colour.RED])[0])
    items = [*serialize.load_segment(data).items, *serialize.load_segment(again).items]
    assert {type(item) for item in items[:-1]} == {script.Point}
    assert items[-1] is script.Colour.RED
    assert items[7] == script.Point(7)


def test_script_classes_are_found_inside_large_values(script: types.ModuleType) -> None:
    text = "x" * 200_000
    item = (text, script.Point(3), [script.make])
    (loaded,) = serialize.load_segment(joined(serialize.dump_segment([item], serialize.MANY)[0])).items
    assert loaded[0] == text
    assert isinstance(loaded[1], script.Point)
    assert isinstance(loaded[2][0](1), script.Point)


def test_script_class_identities_are_the_same_in_a_replay(script: types.ModuleType) -> None:
    from cloudpickle import cloudpickle

    def identities() -> list[str]:
        made = [dataclasses.make_dataclass("Made", ["x"]) for _ in range(2)]
        for class_ in made:
            class_.__module__ = "__main__"
            serialize.dump_segment([class_(1)])
        return [cloudpickle._DYNAMIC_CLASS_TRACKER_BY_CLASS[class_] for class_ in made]

    first = identities()
    assert len(set(first)) == 2, "two classes of one name are two"
    serialize.set_namespace("other")
    serialize.set_namespace("job")
    assert identities() == first


def test_function_of_the_script_and_its_captures(script: types.ModuleType) -> None:
    function = serialize.load_function(serialize.dump_function(script.make))
    assert isinstance(function(3), script.Point)
    lock = threading.Lock()

    def captures_lock() -> Any:
        return lock

    with pytest.raises(TypeError, match=r"captures_lock.* can't be sent to workers"):
        serialize.dump_function(captures_lock)


def test_class_of_the_script_stays_as_its_process_made_it(script: types.ModuleType) -> None:
    """Its objects come back with the state that the class had when it was sent: that is not applied to the one there is."""
    point = script.Point
    data = joined(serialize.dump_segment([point(1)])[0])
    function = serialize.dump_function(script.make)
    double = point.__dict__["double"]
    point.colour = "changed since"
    (loaded,) = serialize.load_segment(data).items
    assert serialize.load_function(function)(1) == loaded == point(1)
    assert type(loaded) is point
    assert point.colour == "changed since"
    assert point.__dict__["double"] is double


def test_class_state_that_was_loaded_follows_what_is_loaded(script: types.ModuleType) -> None:
    """In a worker: each segment's tasks see the class as it was when their arguments were pickled."""
    from grid.api import cloud

    class_ = script.Point
    class_.level = 1
    one = joined(serialize.dump_segment([class_(1)])[0])
    class_.level = 2
    two = joined(serialize.dump_segment([class_(1)])[0])
    cloud._own.discard(class_)  # as in another process
    for data, level in ((one, 1), (one, 1), (two, 2), (one, 1)):
        serialize.load_segment(data)
        assert class_.level == level


def test_item_bytes_do_not_depend_on_what_was_pickled_before(script: types.ModuleType) -> None:
    point, colour = script.Point(1), script.Colour.RED
    items: list[Any] = [point, ("plain", sys.stdout.write.__name__), colour, [point, colour], "text".upper, script.make]
    table = serialize.ClassTable()
    one = [serialize.pickle_value(item, table) for item in items]
    table = serialize.ClassTable()
    other = [serialize.pickle_value(item, table) for item in reversed(items)][::-1]

    def content(item: Any) -> Any:
        return item if isinstance(item, bytes) else b"".join(item.parts)

    assert list(map(content, one)) == list(map(content, other))


def test_segment_bytes_do_not_depend_on_the_order_of_first_use_of_its_classes(script: types.ModuleType) -> None:
    table = serialize.ClassTable()
    serialize.pickle_value(script.Colour.RED, table)
    writer = serialize.SegmentWriter(serialize.ONE, table)
    writer.add(script.Point(1))
    assert joined(writer.finish()[0]) == joined(serialize.dump_segment([script.Point(1)])[0])


def test_class_is_pickled_alike_before_and_after_its_instances(script: types.ModuleType) -> None:
    before = serialize.dump_function(script.make)
    serialize.dump_segment([script.Point(1)])
    script.Point(2).double()
    assert serialize.dump_function(script.make) == before


def test_word_main_in_data_is_no_harm() -> None:
    values = ["__main__", ["__main__"], Counter(["__main__", "if", "__main__"])]
    assert serialize.load_results(joined(serialize.dump_results(values))) == values


def test_unpicklable_value_adds_nothing() -> None:
    writer = serialize.ResultWriter()
    writer.add(1)
    for wrong in (threading.Lock(), (x for x in ()), sys._getframe()):
        with pytest.raises(TypeError):
            writer.add(wrong)
    writer.add(2)
    assert serialize.load_results(joined(writer.finish()[0])) == [1, 2]


def test_exceptions_survive_or_are_given_up(script: types.ModuleType) -> None:
    class Needs(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(one)
            self.two = two

    for error in (ValueError("x"), OSError(2, "no", "file"), script.Odd("y"), ast.literal_eval):
        data = serialize.dump_exception(error)  # type: ignore[arg-type]
        copy = serialize.load_exception(data)
        if isinstance(error, BaseException):
            assert (type(copy), str(copy)) == (type(error), str(error))
    kept = serialize.load_exception(serialize.dump_exception(Needs(1, 2)))
    assert (type(kept), kept.args, kept.two) == (Needs, (1,), 2)  # type: ignore[union-attr]
    locked = Needs(1, 2)
    locked.two = threading.Lock()  # type: ignore[assignment]
    assert serialize.dump_exception(locked) == b""
    assert serialize.load_exception(b"") is None
    assert serialize.load_exception(b"garbage") is None


def test_refs_of_a_segment_are_named() -> None:
    one, two = Ref("aa", 1), Ref("bb", 2)
    _, refs = serialize.dump_segment([(one, 1), (one, [two])], serialize.MANY)
    assert set(refs) == {"aa", "bb"}
    assert serialize.dump_segment([(1,)], serialize.MANY)[1] == ()
