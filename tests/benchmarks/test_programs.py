"""The programs run, with sizes that take seconds; no figure is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.limits import main as limits
from benchmarks.rivals.program import main as rivals
from benchmarks.rivals.session import Failed, Session
from benchmarks.shapes import main as shapes

pytestmark = pytest.mark.real


def run(folder: Path, *words: str) -> dict[str, Any]:
    """One round of small sizes: row → engine → what it measured."""
    path = folder / "found.json"
    rivals([*words, "--small", "--rounds", "1", "--json", str(path)])
    told = json.loads(path.read_text())
    assert told["disagreements"] == []
    assert {row["row"]: row["failures"] for row in told["rows"]} == {row["row"]: {} for row in told["rows"]}
    return {row["row"]: row["rounds"][0] for row in told["rows"]}


def test_engines_of_the_standard_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "texts"
    corpus.mkdir()
    for i in range(20):
        (corpus / f"{i}.txt").write_text(f"one two two {i}\n" * 50)
    (corpus / "binary.txt").write_bytes(b"\xff\xfe")
    only = ["--only", "round_trip", "map", "eff_10ms", "words", "--corpus", str(corpus)]
    found = run(tmp_path, "--engines", "pool", "bare", "serial", *only)
    assert {row: sorted(engines) for row, engines in found.items()} == {
        "round_trip": ["pool"],
        "map": ["pool"],
        "eff_10ms": ["bare", "pool"],
        "words": ["pool", "serial"],
    }
    assert found["words"]["serial"]["check"].startswith("4000 22 two=2000 one=1000 ")
    assert found["map"]["pool"]["best"].startswith("chunksize")
    assert "grid / best of all" in capsys.readouterr().out


def test_ours_in_both_ways(tmp_path: Path) -> None:
    found = run(tmp_path, "--engines", "grid,embedded", "--only", "round_trip")
    assert sorted(found["round_trip"]) == ["embedded", "grid"]
    assert found["round_trip"]["grid"]["replicas"] == 3


def test_an_engine_that_breaks_is_told_and_ended() -> None:
    with Session("pool", 2) as session:
        assert "error" in session.ask("killed", "killed", {"seconds": 0.4, "task_s": 0.02}, 60.0)
        assert "unsupported" in session.ask("peers", "many_workers", {"nodes": 2, "slots": 1, "seconds": 1, "task_s": 0.1}, 60.0)
    with pytest.raises(Failed, match="no result within"), Session("pool", 2) as session:
        session.ask("round_trip", "round_trip", {"count": 10**9, "budget_s": 1e6}, 0.2)


def test_limits_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "limits.json"
    limits(["--only", "hashing", "disk", "--seconds", "0.02", "--json", str(path)])
    assert all(sample > 0 for limit in json.loads(path.read_text())["limits"] for sample in limit["samples"])
    assert "BLAKE3, 1 MiB" in capsys.readouterr().out


def test_work_of_some_shape(tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    shapes(["--peers", "2", "--slots", "1", "--only", "nested", "--json", str(path)])
    found = json.loads(path.read_text())["shapes"]["nested"]
    assert 0 < found["efficiency"] <= 1
    assert sum(found["peers"].values()) == 40 + 20 + 400  # to warm up, those that map, and theirs
