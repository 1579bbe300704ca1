"""put and Ref, files, context and output."""

from __future__ import annotations

import os
import pickle
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

import grid
from grid.api import files as files_module
from grid.api import refs, wire
from tests.api.fake_peer import FakePeer, driving


@pytest.fixture(autouse=True)
def _fresh_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refs, "_cache", refs._Cache())
    monkeypatch.setattr(files_module, "_packs", files_module._Packs())
    monkeypatch.setattr(files_module, "_manifests", {})


def total(values: Any, extra: Any = 0) -> Any:
    return sum(values) + (sum(extra) if isinstance(extra, list) else extra)


def flags(array: Any) -> tuple[bool, float]:
    return bool(array.flags.writeable), float(array[0])


def kinds(*args: Any, **kwargs: Any) -> Any:
    return [type(arg).__name__ for arg in args], {name: type(value).__name__ for name, value in kwargs.items()}


# ---- put -------------------------------------------------------------------------------------------------------------


def test_put_is_resolved_as_an_argument(peer: FakePeer) -> None:
    ref = grid.put([1, 2, 3])
    assert ref.get() == [1, 2, 3]
    assert grid.submit(total, ref, extra=ref).result(20) == 12
    assert list(grid.map(total, [ref, [5]], [1, 2])) == [7, 7]
    assert grid.submit(total, [grid.put(1), 2], 3).result(20) == 6
    assert grid.submit(kinds, ref, [[ref]], (ref,), {"a": ref}, b=ref).result(20) == (
        ["list", "list", "tuple", "dict"],
        {"b": "list"},
    )
    assert {name for page in peer.pages for names in page.refs for name in names} >= {ref.name}


def test_put_same_object_is_the_same_ref(peer: FakePeer) -> None:
    one, two = grid.put("x" * 1000), grid.put("x" * 1000)
    assert one == two
    assert hash(one) == hash(two)
    assert repr(one).startswith("<grid.Ref ")


def test_put_large_array_arrives_as_a_read_only_map(peer: FakePeer) -> None:
    numpy = pytest.importorskip("numpy")
    ref = grid.put(numpy.full(500_000, 7.0))
    peer.wait_for(lambda: any(message.path for message in peer.of(wire.Put)))
    assert grid.submit(flags, ref).result(20) == (False, 7.0)


def test_put_cache_keeps_what_was_used_last(peer: FakePeer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refs, "CACHE_BYTES_MAX", 3000)
    made = [grid.put(bytes([n]) * 1000) for n in range(5)]
    for ref in made:
        ref.get()
    for ref in reversed(made):
        ref.get()
    peer.wait_for(lambda: len(peer.of(wire.Fetch)) == 5 + 3)


def test_put_what_cannot_be_pickled(peer: FakePeer) -> None:
    with pytest.raises(TypeError):
        grid.put(x for x in ())


def test_function_with_large_captures_warns_and_travels_as_a_blob(peer: FakePeer) -> None:
    data = bytes(11 << 20)

    def use(x: int) -> int:
        return len(data) + x

    with pytest.warns(UserWarning, match=r"use captures 1\d MB.*grid\.put"):
        future = grid.submit(use, 1)
    assert future.result(30) == len(data) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert list(grid.map(use, range(3))) == [len(data) + x for x in range(3)]
    assert len(peer.of(wire.Define)) == 1


# ---- files -----------------------------------------------------------------------------------------------------------


def read(file: grid.File) -> tuple[str, int, str]:
    with open(file, encoding="utf-8") as opened:
        assert opened.read() == file.read_text()
    return file.name, file.size, file.read_text()


def read_packed(file: grid.File) -> tuple[bytes, str, list[str]]:
    with file.open() as text, file.open("rb") as binary:
        return binary.read(), file.read_text(), list(text)


def test_files_on_this_machine(peer: FakePeer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("job.py", "corpus/b.txt", "corpus/a.txt", "corpus/deep/c.txt", "corpus/.d.txt", "corpus/x.md"):
        path = tmp_path / "desk" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    main = types.ModuleType("__main__")
    main.__file__ = str(tmp_path / "desk/job.py")
    monkeypatch.setitem(sys.modules, "__main__", main)
    found = grid.files("corpus/**/*.txt")
    assert [file.name for file in found] == ["corpus/a.txt", "corpus/b.txt", "corpus/deep/c.txt"]
    assert [file.name for file in grid.files("corpus")] == [
        "corpus/a.txt",
        "corpus/b.txt",
        "corpus/deep/c.txt",
        "corpus/x.md",
    ]
    assert list(grid.map(read, found)) == [(file.name, len(file.name), file.name) for file in found]
    assert os.fspath(found[0]) == str(tmp_path / "desk/corpus/a.txt")
    with pytest.raises(FileNotFoundError, match="no file matches 'nothing/x': submit with --file nothing/x"):
        grid.files("nothing/x")
    assert [file.name for file in grid.files("../desk/job.py")] == ["../desk/job.py"]
    assert [file.name for file in grid.files(str(tmp_path / "desk" / "*.py"))] == [str(tmp_path / "desk" / "job.py")]


@pytest.fixture
def submitted(tmp_path: Path) -> Any:
    with driving(tmp_path / "peer", inputs="/nowhere/inputs") as fake:
        yield fake


def test_files_of_a_submitted_job_are_read_from_their_pack(submitted: FakePeer) -> None:
    pack = b"alphabeta\nb2"
    (submitted.blobs / "pack1").write_bytes(pack)
    submitted.manifest = [["c/b.txt", 7, "pack1", 5], ["c/a.txt", 5, "pack1", 0], ["@up1/empty", 0, "pack1", 5]]
    found = grid.files("c/*.txt")
    assert [(file.name, file.size) for file in found] == [("c/a.txt", 5), ("c/b.txt", 7)]
    results = list(grid.map(read_packed, found))
    assert results == [(b"alpha", "alpha", ["alpha"]), (b"beta\nb2", "beta\nb2", ["beta\n", "b2"])]
    assert len(submitted.of(wire.Fetch)) == 1
    assert submitted.pages[-1].refs == (("pack1",),)
    assert [file.read_bytes() for file in grid.files("../*")] == [b""]
    with pytest.raises(FileNotFoundError, match="among the files submitted"):
        grid.files("d/*")
    with pytest.raises(ValueError, match="only be read"):
        found[0].open("w")


def test_files_path_of_a_submitted_file_is_fetched(submitted: FakePeer) -> None:
    submitted.manifest = [["@/data/a.txt", 5, "pack1", 0], ["gone.txt", 1, "pack1", 0]]
    submitted.inputs = {"@/data/a.txt": b"alpha"}
    (submitted.blobs / "pack1").write_bytes(b"alpha")
    (file,) = grid.files("/data/*.txt")
    assert file.name == "/data/a.txt"
    before = pickle.dumps(file)
    assert Path(file).read_text() == "alpha"
    assert pickle.dumps(file) == before, "where it lies on this machine is no business of others"
    assert read(file) == ("/data/a.txt", 5, "alpha")
    (gone,) = grid.files("gone.txt")
    with pytest.raises(grid.GridError, match=r"no input file is called gone\.txt"):
        os.fspath(gone)


# ---- context, output -------------------------------------------------------------------------------------------------


def test_context_in_the_driver(peer: FakePeer) -> None:
    here = grid.context()
    assert (here.job, here.job_name, here.stage, here.task) == ("a" * 32, "test", None, None)
    assert here.seed == grid.context().seed


def test_output_makes_parents_and_stays_inside(peer: FakePeer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    path = grid.output("a/b.txt")
    assert path == tmp_path / "output/a/b.txt"
    path.write_text("x")
    for wrong in ("", ".", "/etc/passwd", "../x", "a/../../x", "a\0b"):
        with pytest.raises(ValueError, match="no name for an output"):
            grid.output(wrong)
    (tmp_path / "output/link").symlink_to("/tmp")
    with pytest.raises(ValueError, match="leads out"):
        grid.output("link/x")
