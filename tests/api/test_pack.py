"""Packing a script: header, imports, dependencies, inputs."""

from __future__ import annotations

import json
import json.decoder
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from grid import pack_lock
from grid.api import files
from grid.pack import PackError, Submission, pack


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to write scripts in, which is also where the user stands."""
    folder = tmp_path / "desk"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def write(folder: Path, name: str, text: str = "") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def packed(desk: Path, text: str, args: tuple[str, ...] = (), **options: Any) -> Submission:
    script = write(desk, "job.py", text)
    staging = desk.parent / "staging"
    staging.mkdir(exist_ok=True)
    return pack(script, args, {key.replace("_", "-"): value for key, value in options.items()}, staging, cache=desk.parent)


def refused(desk: Path, text: str, **options: Any) -> PackError:
    with pytest.raises(PackError) as caught:
        packed(desk, text, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def members(submission: Submission) -> list[str]:
    with tarfile.open(submission.code) as archive:
        return archive.getnames()


def manifest(submission: Submission) -> dict[str, bytes]:
    """The inputs as a worker would read them, checked against their names."""
    assert submission.manifest is not None
    blobs = {blake3(Path(path).read_bytes()).hexdigest(): Path(path).read_bytes() for path in submission.pack_paths}
    rows = json.loads(Path(submission.manifest).read_text())
    return {name: blobs[blob][offset : offset + size] for name, size, blob, offset in rows}


# ---- script, header --------------------------------------------------------------------------------------------------


def test_plain_script(desk: Path) -> None:
    submission = packed(desk, "import os, grid\n", ("--file", "x"), seed=3)
    assert submission.name == submission.script == "job.py"
    assert submission.argv == ["--file", "x"]
    assert submission.options == {"seed": 3}
    assert members(submission) == ["job.py"]
    assert (submission.lock, submission.manifest, submission.pack_paths) == (None, None, [])


def test_archive_is_deterministic(desk: Path) -> None:
    write(desk, "helper.py", "x = 1\n")
    first = Path(packed(desk, "import helper\n").code).read_bytes()
    os.utime(desk / "helper.py", (1, 1))
    os.chmod(desk / "helper.py", 0o600)
    assert Path(packed(desk, "import helper\n").code).read_bytes() == first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (\n", "job.py:1: syntax error: '(' was never closed"),
        ("import os\ndef f(:\n", "job.py:2: syntax error"),
        ("x = '\0'", "null bytes"),
        ("# /// script\n# dependencies = [\n# ///\n", "is not TOML"),
        ("# /// script\n# dependencies = 'numpy'\n# ///\n", "a list of strings"),
        ("# /// script\n# requires-python = '>=3.99'\n# ///\n", "requires Python >=3.99"),
        ("# /// script\n# requires-python = 'new'\n# ///\n", "no version specifier"),
        ("# /// script\n# [tool.grid]\n# speed = 3\n# ///\n", "no option 'speed'"),
        ("# /// script\n# [tool.grid]\n# timeout = 'soon'\n# ///\n", "'soon' is not a duration"),
        ("# /// script\n# [tool.grid]\n# retries = -1\n# ///\n", "retries must be a whole number from 0"),
        ("# /// script\n# dependencies = ['two words']\n# ///\n", "'two words' is no requirement"),
        ("# /// script\n# dependencies = ['./here']\n# ///\n", "is no requirement"),
    ],
)
def test_what_is_wrong_is_one_line(desk: Path, text: str, message: str) -> None:
    assert message in str(refused(desk, text))


def test_script_missing(desk: Path) -> None:
    with pytest.raises(PackError, match=r"no such script: nowhere\.py"):
        pack("nowhere.py", [], {}, desk)
    with pytest.raises(PackError, match="is not a file"):
        pack(desk, [], {}, desk)


def test_header_options_are_beaten_by_the_command_line(desk: Path) -> None:
    write(desk, "a.txt", "a")
    write(desk, "b.txt", "b")
    text = """
# /// script
# requires-python = ">=3.11"
# dependencies = ["peergrid"]
# [tool.grid]
# files = "a.txt"
# task_timeout = "2m"
# memory = "1G"
# retries = 2
# env = {A = "1", B = "2"}
# tag = ["x"]
# ///
"""
    submission = packed(desk, text, retries=5, env={"B": "3"}, files=["b.txt"])
    assert submission.options == {"task-timeout": 120.0, "memory": 1 << 30, "retries": 5, "tags": ["x"]}
    assert submission.env == {"A": "1", "B": "3"}
    assert manifest(submission) == {"a.txt": b"a", "b.txt": b"b"}
    assert submission.lock is None


# ---- imports ---------------------------------------------------------------------------------------------------------


def test_undeclared_import_names_the_line_to_type(desk: Path) -> None:
    write(desk, "helper.py", "\n\ndef f():\n    import PIL.Image\n")
    error = refused(desk, "import nosuchmodule.sub\nimport helper\n")
    assert "job.py:1 imports nosuchmodule and PIL, which are neither standard, local nor declared" in str(error)
    assert "--with nosuchmodule --with pillow" in error.hint


@pytest.mark.parametrize(
    "text",
    [
        "try:\n    import nosuch\nexcept ImportError:\n    import json as nosuch\n",
        "try:\n    import nosuch\nexcept (OSError, ModuleNotFoundError):\n    nosuch = None\n",
        "try:\n    import nosuch\nexcept Exception:\n    pass\n",
        "import contextlib\nwith contextlib.suppress(ImportError):\n    import nosuch\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import nosuch\n",
        "import typing\nif typing.TYPE_CHECKING:\n    from nosuch import x\nelse:\n    x = 1\n",
        "from __future__ import annotations\nimport __main__, sys, xml.dom\n",
        "import grid\nfrom grid import map\n",
    ],
)
def test_imports_that_may_fail_are_no_errors(desk: Path, text: str) -> None:
    packed(desk, text)


@pytest.mark.parametrize(
    "text",
    [
        "try:\n    import nosuch\nfinally:\n    pass\n",
        "try:\n    import nosuch\nexcept ValueError:\n    pass\n",
        "def f():\n    from nosuch import x\n",
        "if True:\n    import nosuch\n",
    ],
)
def test_imports_that_must_succeed_are(desk: Path, text: str) -> None:
    assert "nosuch" in str(refused(desk, text))


def test_local_modules_travel_whole_packages_with_their_data(desk: Path) -> None:
    write(desk, "helper.py", "from tools.deep import thing\nimport cli, dht\n")
    write(desk, "tools/__init__.py")
    write(desk, "tools/deep/__init__.py", "from . import thing\nfrom ..side import x\n")
    write(desk, "tools/deep/thing.py", "from ..side import x\n")
    write(desk, "tools/side.py", "x = 1\n")
    write(desk, "tools/table.csv", "1,2\n")
    write(desk, "tools/.secret", "no")
    write(desk, "tools/__pycache__/side.pyc", "no")
    write(desk, "cli.py")
    write(desk, "dht.py")
    write(desk, "unused.py", "import nosuch\n")
    write(desk, "space/part.py", "y = 1\n")
    submission = packed(desk, "import helper\nfrom space.part import y\n")
    assert sorted(members(submission)) == [
        "cli.py",
        "dht.py",
        "helper.py",
        "job.py",
        "space/part.py",
        "tools/__init__.py",
        "tools/deep/__init__.py",
        "tools/deep/thing.py",
        "tools/side.py",
        "tools/table.csv",
    ]


def test_local_module_with_a_syntax_error(desk: Path) -> None:
    write(desk, "helper.py", "\n)\n")
    assert "helper.py:2: syntax error" in str(refused(desk, "import helper\n"))


def test_local_package_of_data_is_too_large(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grid.pack.CODE_BYTES_MAX", 1000)
    write(desk, "tools/__init__.py")
    write(desk, "tools/big.bin", "x" * 2000)
    error = refused(desk, "import tools\n")
    assert "tools/big.bin" in str(error)
    assert "--file" in error.hint


def test_a_grid_py_in_the_way(desk: Path) -> None:
    write(desk, "grid.py")
    error = refused(desk, "import grid\n")
    assert "grid.py is in the way" in str(error)
    assert error.hint == "rename it"


# ---- dependencies ----------------------------------------------------------------------------------------------------

LOCK = "numpy==2.0.0 \\\n    --hash=sha256:00\npillow==11.0\nsix==1.16 ; python_version < '4'\n"


def test_declared_imports_are_accepted_and_the_lock_is_remembered(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compile_(uv: str, text: str, python: str) -> str:
        asked.append(text)
        return LOCK

    monkeypatch.setattr(pack_lock, "_compile", compile_)
    text = "# /// script\n# dependencies = ['numpy>=2', 'peergrid']\n# ///\nimport numpy as np, six\nfrom PIL import Image\n"
    for _ in range(2):
        assert packed(desk, text, **{"with": ["Pillow"]}).lock == LOCK
    assert asked == ["Pillow\nnumpy>=2\n"]


def test_import_that_no_declared_package_brings(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_lock, "_compile", lambda *_: LOCK)
    error = refused(desk, "import numpy\nimport nosuch\n", **{"with": ["numpy"]})
    assert "job.py:2 imports nosuch, which is neither" in str(error)


def test_package_of_another_name_gets_the_benefit_of_the_doubt(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_lock, "_compile", lambda *_: LOCK + "strange-name==1\n")
    packed(desk, "import numpy\nimport nosuch\n", **{"with": ["numpy", "strange-name"]})


def test_uv_says_no(desk: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "uv"
    fake.write_text(
        "#!/bin/sh\nprintf 'error: No solution found when resolving dependencies\\n  cause: Because x\\n' >&2\nexit 1\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(pack_lock, "_find_uv", lambda: str(fake))
    error = refused(desk, "import x\n", **{"with": ["x>9"]})
    assert str(error) == "the dependencies (x>9) can't be resolved: Because x"


# ---- inputs ----------------------------------------------------------------------------------------------------------


def test_inputs_by_file_folder_and_pattern(desk: Path) -> None:
    write(desk, "corpus/a.txt", "a")
    write(desk, "corpus/deep/b.txt", "bb")
    write(desk, "corpus/c.md", "c")
    write(desk, "corpus/.hidden", "no")
    write(desk, "corpus/.git/config", "no")
    outside = write(desk.parent, "outside/o.txt", "o")
    (desk / "corpus/link.txt").symlink_to(outside)
    (desk / "corpus/loop").symlink_to(desk / "corpus")
    (desk / "corpus/broken").symlink_to(desk / "nothing")
    os.mkfifo(desk / "corpus/pipe")
    one = packed(desk, "", files=["corpus/*.txt"])
    assert manifest(one) == {"corpus/a.txt": b"a", "corpus/link.txt": b"o"}
    two = packed(desk, "", files=["corpus", "../outside/o.txt", str(outside.parent)])
    assert manifest(two) == {
        "@" + str(outside): b"o",
        "@up1/outside/o.txt": b"o",
        "corpus/a.txt": b"a",
        "corpus/c.md": b"c",
        "corpus/deep/b.txt": b"bb",
        "corpus/link.txt": b"o",
    }
    assert sorted(note.split("corpus/")[1] for note in two.notes) == [
        "broken: not a regular file",
        "loop: the link leads back up",
        "pipe: not a regular file",
    ]


def test_peers_home_among_the_inputs_never_travels(desk: Path) -> None:
    write(desk, "data/a.txt", "a")
    for name in ("identity", "machine.json", "membership"):
        write(desk, f"data/home/{name}", "secret")
    done = packed(desk, "", files=["data"])
    assert manifest(done) == {"data/a.txt": b"a"}
    assert [note for note in done.notes if "a peer's home" in note]


def test_pythons_own_library_has_the_same_names_everywhere(desk: Path) -> None:
    found = manifest(packed(desk, "", files=["{stdlib}/json/*.py"]))
    assert found["{stdlib}/json/decoder.py"] == Path(json.decoder.__file__).read_bytes()
    assert all(name.startswith("{stdlib}/json/") for name in found)


def test_inputs_relative_to_where_the_user_stands(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = write(desk, "jobs/job.py", "# /// script\n# [tool.grid]\n# files = ['here.txt']\n# ///\n")
    write(desk, "jobs/here.txt", "h")
    write(desk, "data/x.txt", "x")
    staging = desk.parent / "staging"
    staging.mkdir()
    submission = pack(script, [], {"files": ["data"]}, staging)
    assert manifest(submission) == {"@up1/data/x.txt": b"x", "here.txt": b"h"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing.txt", "no file matches --file nothing.txt"),
        ("*.nothing", "no file matches"),
        ("empty", "no file matches"),
        (".env", "is a dotfile"),
        ("pipe", "is not a regular file"),
        ("gone", "is a broken link"),
    ],
)
def test_inputs_that_are_not_there(desk: Path, spec: str, message: str) -> None:
    write(desk, ".env", "secret")
    (desk / "empty").mkdir()
    os.mkfifo(desk / "pipe")
    (desk / "gone").symlink_to("nothing")
    assert message in str(refused(desk, "", files=[spec]))


def test_inputs_small_ones_share_packs_and_large_ones_have_their_own(desk: Path) -> None:
    for number in range(300):
        write(desk, f"corpus/{number:03}.txt", f"{number}" * 4000)
    write(desk, "corpus/large.bin", "x" * 3_000_000)
    write(desk, "corpus/twin.bin", "x" * 3_000_000)
    write(desk, "corpus/empty.txt")
    submission = packed(desk, "", files=["corpus"])
    found = manifest(submission)
    assert len(found) == 303
    assert found["corpus/007.txt"] == b"7" * 4000
    sizes = [Path(path).stat().st_size for path in submission.pack_paths]
    assert sizes.count(3_000_000) == 1
    assert len(sizes) == 5
    assert max(size for size in sizes if size < 3_000_000) <= 1 << 20


PARTS = st.sampled_from(["a", "b.txt", "c", "d.py", "e[1]", "f f"])


@given(st.lists(PARTS, min_size=1, max_size=4), st.integers(0, 3), st.booleans())
def test_manifest_names_come_back(parts: list[str], ups: int, absolute: bool) -> None:
    name = "/" + "/".join(parts) if absolute else "../" * ups + "/".join(parts)
    stored = files.manifest_name(name)
    assert not stored.startswith("/")
    assert ".." not in stored.split("/")
    assert files.plain_name(stored) == name


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("*.txt", ["a.txt"], ["a/b.txt", "a.md", "../a.txt"]),
        ("**/*.txt", ["a.txt", "a/b/c.txt"], ["a.md", "/x/a.txt"]),
        ("corpus", ["corpus/a", "corpus/b/c"], ["corpus2/a", "a/corpus"]),
        ("./corpus/**", ["corpus/a", "corpus/b/c"], ["corpus"]),
        ("c?r[a-c].t", ["cxra.t", "cxrc.t"], ["cxrd.t", "c/ra.t"]),
        ("x[!0-9]", ["xa"], ["x1", "x/"]),
        ("../data/*.csv", ["../data/a.csv"], ["data/a.csv"]),
        ("/data/**/*.csv", ["/data/a.csv", "/data/x/y.csv"], ["data/a.csv"]),
        ("**", ["a", "b/c"], []),
        (".", ["a", "b/c"], ["../a", "/a"]),
    ],
)
def test_patterns(pattern: str, matching: list[str], other: list[str]) -> None:
    matches = files.matcher(pattern)
    assert [name for name in matching if not matches(name)] == []
    assert [name for name in other if matches(name)] == []
