"""Worlds run, replay exactly, and tell what is wrong with them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from simulations import scenario, world
from simulations.cli import app
from simulations.faults import POINTS
from simulations.programs import PROGRAMS, serial


def _hash(name: str, seed: int, hash_seed: int) -> str:
    """The trace hash of a run in a process of its own."""
    code = f"from simulations import scenario, world; print(world.run(scenario.load({name!r}), {seed}).trace_hash)"
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=100)
    return done.stdout.strip()


@pytest.mark.parametrize(("name", "seed"), [("leaders", 1), ("partitions", 2), ("suspend", 3), ("dht", 4)])
def test_one_seed_replays_one_run_whatever_the_hash_seed(name: str, seed: int) -> None:
    assert _hash(name, seed, 1) == _hash(name, seed, 2)


def test_another_seed_is_another_run() -> None:
    of = scenario.load("pair")
    assert world.run(of, 1).trace_hash != world.run(of, 2).trace_hash


@pytest.mark.parametrize("name", scenario.names(swarm=True))
def test_scenario_runs_clean(name: str) -> None:
    report = world.run(scenario.load(name), 1)
    assert report.violations == []


def test_every_persist_and_send_point_is_one_that_a_seed_kills_at() -> None:
    assert {point for point in POINTS if point.startswith("before persist")}
    chosen = {POINTS[seed % len(POINTS)] for seed in range(1, len(POINTS) + 1)}
    assert chosen == set(POINTS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_serial_run_is_the_same_every_time(program: str) -> None:
    assert serial(program, 40, 0.1) == serial(program, 40, 0.1)
    assert serial(program, 40, 0.1).stdout


def test_a_wrong_world_is_told_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(of: scenario.Scenario, seed: int, show: object = None) -> world.Report:
        return world.Report(of.name, seed, ["something is wrong"])

    monkeypatch.setattr(world, "run", broken)
    done = CliRunner().invoke(app, ["swarm", "pair", "--seeds", "7..8", "--processes", "1"])
    assert done.exit_code == 1
    assert "python -m simulations run pair --seed 7" in done.output
    assert CliRunner().invoke(app, ["run", "pair", "--seed", "7"]).exit_code == 1


def test_a_trace_tells_messages_syncs_and_releases() -> None:
    lines: list[str] = []
    report = world.run(scenario.load("pair"), 5, lines.append)
    assert report.trace_lines == len(lines)
    kinds = {line.split()[1] for line in lines}
    assert {"message", "request", "fsync", "persist", "release", "final"} <= kinds


@pytest.mark.parametrize(
    ("name", "seed"),
    [("points", 20238), ("points", 20564), ("suspend", 20189), ("oneway", 2), ("overnet", 20008), ("overnet", 30004)],
)
def test_worlds_in_which_faults_were_found_stay_clean(name: str, seed: int) -> None:
    assert world.run(scenario.load(name), seed).violations == []
