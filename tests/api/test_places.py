"""Paths in pickles: of the machine that loads them."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grid.api import cloud, places, serialize

SOURCE = """
import contextlib, os
from pathlib import Path
HERE = Path(__file__).parent
FOLDER = os.path.dirname(__file__)
WORK = WORKFOLDER
class Config:
    folder = FOLDER + "/"
def f(default=FOLDER + "/a"):
    return f.__code__.co_filename, __file__, str(HERE / "x"), FOLDER, WORK, default, Config.folder
def captures():
    path = os.path.join(FOLDER, "deep", "er")
    return lambda: path
@contextlib.contextmanager
def managed(): yield
"""

Home = Callable[[str], types.ModuleType]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """Become a machine with another home, and run the script there."""

    def move(name: str) -> types.ModuleType:
        script, work = str(tmp_path / name / "code" / "job.py"), str(tmp_path / name / "work")
        places.set_places(str(Path(script).parent), work)
        serialize.set_namespace(name)  # so that classes are identified anew
        serialize.set_namespace("job")
        module = types.ModuleType("__main__")
        module.__dict__.update(__file__=script, WORKFOLDER=work)
        monkeypatch.setitem(sys.modules, "__main__", module)
        exec(compile(SOURCE, script, "exec"), module.__dict__)
        return module

    yield move
    places.set_places("", "")
    serialize.set_namespace("")


@pytest.mark.parametrize("make", [lambda m: m.f, lambda m: m.captures(), lambda m: m.managed, lambda m: m.f.__code__])
def test_function_has_the_same_bytes_in_every_home(home: Home, make: Callable[[types.ModuleType], Any]) -> None:
    one = serialize.dump_function(make(home("one")))
    assert serialize.dump_function(make(home("another/longer"))) == one
    assert b"one" not in one.replace(b"None", b"")
    assert str(Path(sys.executable).parents[1]).encode() not in one


def test_paths_lead_to_the_home_that_loads_them(home: Home, tmp_path: Path) -> None:
    data = serialize.dump_function(home("one").f)
    home("two")
    cloud._own.clear()  # another process
    folder = str(tmp_path / "two" / "code")
    work = str(tmp_path / "two" / "work")
    found = serialize.load_function(data)()
    assert found == (f"{folder}/job.py", f"{folder}/job.py", f"{folder}/x", folder, work, f"{folder}/a", f"{folder}/")


def test_code_of_the_standard_library_is_found_again(home: Home) -> None:
    import contextlib

    managed = serialize.load_function(serialize.dump_function(home("one").managed))
    assert managed.__code__.co_filename == contextlib.__file__
    assert managed.__globals__["__file__"] == contextlib.__file__


def test_only_whole_folders_count(home: Home, tmp_path: Path) -> None:
    home("one")
    folder = str(tmp_path / "one" / "code")
    for text in (folder + "x", folder[:-1], "x" + folder, "", "relative/path"):
        assert places.of_value(text) is text
    for rest in ("", "/", "//x", "/a/../b", "/{work}/x"):
        assert places.of_value(folder + rest).text == "{script}" + rest
        assert places.find("{script}" + rest) == folder + rest
    assert places.find("{path}/no/such/file") == "{path}/no/such/file"
    assert places.of_file("<string>") == "<string>"


def test_folder_behind_a_link_is_the_same_folder(home: Home, tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    places.set_places(str(tmp_path / "link"), "")
    assert places.of_value(str(real / "x")).text == places.of_value(str(tmp_path / "link" / "x")).text == "{script}/x"
    assert places.find("{script}/x") == str(tmp_path / "link" / "x")
