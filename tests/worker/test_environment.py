"""Environments built by uv from a local wheel: no network."""

# ruff: noqa: ASYNC110, ASYNC240 - small files and short programs
from __future__ import annotations

import base64
import hashlib
import os
import zipfile
from pathlib import Path

import pytest
import trio

from grid.api import wire
from grid.worker import environment as module
from grid.worker.environment import Environment, EnvironmentFailed, ensure, python_minor, telling_lines
from grid.worker.pool import WorkerPool
from tests.worker.conftest import PATIENCE_S, Tasks

pytestmark = pytest.mark.real


def make_wheel(folder: Path, name: str, source: str) -> str:
    """Write the wheel of a one-module package; return its line in a lock."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for entry, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{entry},sha256={digest},{len(text)}\n"
    with zipfile.ZipFile(path, "w") as archive:
        for entry, text in files.items():
            archive.writestr(entry, text)
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    return f"{name} @ {path.as_uri()} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


@pytest.fixture
def lock(tmp_path: Path) -> str:
    """A lock with one package."""
    return make_wheel(tmp_path, "tinypackage", "ANSWER = 42\n")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty cache."""
    return tmp_path / "environments"


async def test_built_once_used_by_workers(pool: WorkerPool, setup: wire.Setup, lock: str, cache: Path) -> None:
    with trio.fail_after(PATIENCE_S):
        environment = await ensure(lock, python_minor(), cache)
        built = os.stat(environment.folder).st_ino
        again = await ensure(lock, python_minor(), cache)
        assert again == environment
        assert os.stat(again.folder).st_ino == built
        assert not list(cache.glob("*.tmp"))
        job = await pool.open_job(setup=setup, environment=environment)
        tasks = Tasks(await job.start_worker())

    def look() -> tuple[int, list[str], str]:
        import importlib.util
        import sys

        import tinypackage  # type: ignore[import-not-found]

        names = [name for name in ("numpy", "trio", "dht") if importlib.util.find_spec(name)]
        return tinypackage.ANSWER, names, sys.prefix

    assert await tasks.call(look) == (42, [], environment.folder)
    with trio.fail_after(PATIENCE_S):
        await job.aclose()


async def test_read_only(lock: str, cache: Path) -> None:
    with trio.fail_after(PATIENCE_S):
        environment = await ensure(lock, python_minor(), cache)
    site = Path(environment.sites[0])
    for path in (Path(environment.folder), site, site / "tinypackage.py"):
        assert not path.stat().st_mode & 0o222, path


async def test_two_at_once_build_one_after_the_other(lock: str, cache: Path) -> None:
    found: list[Environment] = []

    async def one() -> None:
        found.append(await ensure(lock, python_minor(), cache))

    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            nursery.start_soon(one)
    assert found[0] == found[1]


async def test_failure_says_what_uv_says(tmp_path: Path, lock: str, cache: Path) -> None:
    for text, words in (
        (lock.replace("sha256:", "sha256:0000")[:-5] + "\n", "Hash mismatch"),
        (f"tinypackage @ {(tmp_path / 'absent-1.0-py3-none-any.whl').as_uri()} --hash=sha256:{'0' * 64}\n", "absent"),
        ("not a requirement\n", "requirements.txt"),
    ):
        with trio.fail_after(PATIENCE_S), pytest.raises(EnvironmentFailed) as caught:
            await ensure(text, python_minor(), cache)
        message = str(caught.value)
        assert words in message
        assert len(message.splitlines()) <= module.MESSAGE_LINES_MAX + 1
        assert not list(cache.glob("*.tmp"))
    with pytest.raises(EnvironmentFailed, match=r"needs Python 3\.99"):
        await ensure(lock, "3.99", cache)


async def test_cancelled_build_leaves_nothing(lock: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """uv is a program that starts another and never ends; both are gone afterwards, and the lock is free."""
    fake = cache.parent / "uv"
    pids = cache.parent / "pids"
    fake.write_text(f"#!/bin/sh\nsleep 1000 &\necho $$ $! > {pids}~\nmv {pids}~ {pids}\nwait\n")
    fake.chmod(0o755)
    monkeypatch.setattr("uv.find_uv_bin", lambda: str(fake))
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ensure, lock, python_minor(), cache)
            while not pids.exists():
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    assert not list(cache.glob("*.tmp"))
    for pid in pids.read_text().split():
        with trio.fail_after(PATIENCE_S):
            while os.path.exists(f"/proc/{pid}") and "Z" not in Path(f"/proc/{pid}/stat").read_text():
                await trio.sleep(0.01)
    monkeypatch.undo()
    with trio.fail_after(PATIENCE_S):
        await ensure(lock, python_minor(), cache)


async def test_longest_unused_goes_first_but_none_in_use(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ENVIRONMENTS_MAX", 2)
    locks = [make_wheel(tmp_path, f"package{n}", "") for n in range(4)]
    with trio.fail_after(60):
        held = await ensure(locks[0], python_minor(), cache)
        await ensure(locks[1], python_minor(), cache)
        for age, lock in enumerate(locks[:2]):
            marker = cache / f"{module.environment_key(lock)}.used"
            os.utime(marker, (1000 + age, 1000 + age))
        await ensure(locks[2], python_minor(), cache)
        there = [(cache / module.environment_key(lock)).exists() for lock in locks]
        assert there == [True, False, True, False]  # 0 is the oldest, but `held` is in use
        del held
        os.utime(cache / f"{module.environment_key(locks[0])}.used", (1000, 1000))
        await ensure(locks[3], python_minor(), cache)
    there = [(cache / module.environment_key(lock)).exists() for lock in locks]
    assert there == [False, False, True, True]


async def test_cache_that_cannot_be_made(tmp_path: Path, lock: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFailed, match="no environments can be kept"):
        await ensure(lock, python_minor(), tmp_path / "file" / "cache")


def test_telling_lines_of_uv() -> None:
    text = "Using Python 3\n  \u00d7 No solution found:\n  \u2570\u2500\u25b6 Because a needs b\n      and b is not there, no.\n"
    assert telling_lines(text) == "No solution found:\nBecause a needs b\nand b is not there, no."
    assert telling_lines("error: it broke\n  Caused by: disk full\n") == "it broke\nCaused by: disk full"
    assert telling_lines("") == "uv failed and did not say why"
    assert telling_lines("error: x\n" + "line\n" * 20).endswith("(15 more lines)")
