"""Homes, settings and the values people type."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from grid import config
from grid.api.client import socket_path
from grid.config import ConfigError, Home, JoinOptions, parse_address, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("4G", 4 << 30), ("512M", 512 << 20), ("1.5k", 1536), ("4096", 4096), ("2GiB", 2 << 30), ("3 MB", 3 << 20), ("1T", 1 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "4X", "4GG", "1e9", "4 G G", "9" * 30, "0.0001", "xG"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("24h", 86400), ("90s", 90), ("1h30m", 5400), ("500ms", 0.5), ("2d", 172800), ("90", 90), ("1.5m", 90), ("1w", 604800)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "h", "-5s", "0", "5x", "1h30", "30 1h", "1h 30m ", "inf", "9" * 40])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("host.lan:4743", ("host.lan", 4743)),
        ("host", ("host", 4743)),
        (":5000", ("0.0.0.0", 5000)),
        ("[::1]:5000", ("::1", 5000)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address
    assert parse_address(config.format_address(address)) == address


@pytest.mark.parametrize("text", ["", "host:", "host:70000", "a:b", "::1", "http://x:1", "a b:1", "host:-1"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="is not an address"):
        parse_address(text)


def test_home_is_private_and_laid_out(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "new" / "home", create=True)
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
    assert all(folder.is_dir() for folder in (home.blobs, home.jobs, home.envs, home.staging))
    assert not home.joined
    assert Home.open(home.path) == home


def test_home_default_is_named_by_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRID_HOME", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert config.home_folder() == tmp_path / "peergrid" / config.machine_id()
    monkeypatch.setenv("GRID_HOME", str(tmp_path / "x"))
    assert config.home_folder() == tmp_path / "x"


def test_home_not_made_by_looking(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "none")
    assert not home.path.exists()


def test_home_of_other_machine_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Home.open(tmp_path / "h", create=True)
    monkeypatch.setattr(config, "machine_id", lambda: "0" * 32)
    with pytest.raises(ConfigError, match="belongs to another machine"):
        Home.open(tmp_path / "h")


def test_home_of_cloned_machine_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"host": "one", "cards": ["52:54:00:00:00:01"]}
    monkeypatch.setattr(config, "_host", lambda: here)
    Home.open(tmp_path / "h", create=True)
    here = {"host": "renamed", "cards": ["52:54:00:00:00:01"]}
    Home.open(tmp_path / "h")  # a machine may be renamed
    here = {"host": "one", "cards": ["52:54:00:00:00:02"]}
    Home.open(tmp_path / "h")  # or get a new card
    here = {"host": "renamed", "cards": []}
    Home.open(tmp_path / "h")  # a container shows no card
    here = {"host": "two", "cards": ["52:54:00:00:00:02"]}
    with pytest.raises(ConfigError, match="belongs to another machine"):
        Home.open(tmp_path / "h")


def test_home_in_folder_with_other_things_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    mode = tmp_path.stat().st_mode
    with pytest.raises(ConfigError, match="something else"):
        Home.open(tmp_path, create=True)
    assert tmp_path.stat().st_mode == mode
    with pytest.raises(ConfigError, match="is not a folder"):
        Home.open(tmp_path / "thesis.tex")
    with pytest.raises(ConfigError, match="can't make the home"):
        Home.open(tmp_path / "thesis.tex" / "h", create=True)


def test_lock_names_the_holder_and_dies_with_it(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "h", create=True)
    hold = (
        "import sys; from grid.config import Home\n"
        "with Home.open(sys.argv[1]).lock(): print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(home.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=rf"already runs in .* \(pid {process.pid}\)"), home.lock():
            pass
        process.kill()
    with home.lock(), pytest.raises(ConfigError, match=f"pid {os.getpid()}"), home.lock():
        pass
    with home.lock():
        assert (home.path / "lock").read_text().strip() == str(os.getpid())


def test_socket_of_short_home_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    home = Home.open(Path("/tmp") / f"h{os.getpid()}", create=True)
    try:
        (home.path / "control.path").write_text("/stale")
        assert home.bind_path() == home.path / "control.sock"
        assert socket_path(home.path) == str(home.path / "control.sock")
    finally:
        subprocess.run(["rm", "-r", str(home.path)], check=True)


def test_socket_of_deep_home_is_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Path(f"/tmp/r{os.getpid()}")
    runtime.mkdir(mode=0o700)
    try:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
        homes = [Home.open(tmp_path / ("deep" * 25) / str(i), create=True) for i in range(2)]
        paths = [home.bind_path() for home in homes]
        assert all(len(os.fsencode(path)) <= config.SOCKET_PATH_BYTES_MAX for path in paths)
        assert paths[0] != paths[1]
        assert socket_path(homes[0].path) == str(homes[0].path / "control.sock")  # nothing there yet to be trusted
        paths[0].touch()
        assert socket_path(homes[0].path) == str(paths[0])
    finally:
        subprocess.run(["rm", "-r", str(runtime)], check=True)


def test_runtime_folder_of_another_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_folder = Path(f"/tmp/o{os.getpid()}")
    (open_folder / "peergrid").mkdir(parents=True)
    (open_folder / "peergrid").chmod(0o777)
    try:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(open_folder))
        home = Home.open(tmp_path / ("deep" * 25), create=True)
        assert open_folder not in home.bind_path().parents
    finally:
        subprocess.run(["rm", "-r", str(open_folder)], check=True)


def test_settings_saved_and_beaten(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "h", create=True)
    bare = home.settle(JoinOptions(), save=False)
    assert bare.listen == "0.0.0.0:4743"
    assert bare.slots == config.slots_default()
    assert bare.name
    assert bare.tags == ()
    assert not home.settings.exists()
    home.settle(JoinOptions(listen="127.0.0.1:0", tags=("gpu", "big"), slots=3, memory_bytes=1 << 30))
    later = home.settle(JoinOptions(slots=5, no_work=True))
    assert (later.listen, later.tags, later.slots, later.memory_bytes) == ("127.0.0.1:0", ("gpu", "big"), 5, 1 << 30)
    assert home.settle(JoinOptions(no_work=False), save=False).no_work is False
    assert home.settle(JoinOptions(), save=False).no_work is True
    assert json.loads(home.settings.read_text())["slots"] == 5
    home.settings.write_text("{damaged")
    assert home.settle(JoinOptions(), save=False).slots == config.slots_default()


def test_last_port(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home", create=True)
    assert home.last_port == 0
    home.remember_port(4744)
    assert home.last_port == 4744
    (home.path / "port").write_text("4744747")
    assert home.last_port == 0


def test_last_job(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "h", create=True)
    assert home.last_job is None
    home.remember_job("ab" * 32)
    assert home.last_job == "ab" * 32


def test_write_file_leaves_no_temporary_file_behind(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "in the way").touch()
    with pytest.raises(OSError, match=r"."):
        config.write_file(target, b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    config.write_file(tmp_path / "file", b"x")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
