"""How bars are judged and engines compared."""

from __future__ import annotations

import pytest

from benchmarks.rivals import report
from benchmarks.rivals.engines import ENGINES, engine_class
from benchmarks.rivals.program import chosen
from benchmarks.rivals.report import Found
from benchmarks.rivals.rows import ROWS, Round, Row

ROW = {row.key: row for row in ROWS}


def bars(row: Row, *rounds: Round) -> dict[str, tuple[float | None, bool | None]]:
    """Label → (median, reached)."""
    told = (report.judged(bar, rounds) for bar in row.bars)
    return {each["bar"]: (each["median"], each["reached"]) for each in told}


def test_a_ratio_is_taken_within_each_round() -> None:
    one = {"grid": {"p50_ms": 1.0, "p99_ms": 3.0}, "pool": {"p50_ms": 1.0}}
    two = {"grid": {"p50_ms": 9.0, "p99_ms": 27.0}, "pool": {"p50_ms": 10.0}}  # the machine was slow, for both
    assert bars(ROW["round_trip"], one, two) == {
        "p50: grid / pool": (0.95, True),
        "p50: grid / ray": (None, None),
        "grid: p99 / p50": (3.0, True),
    }


def test_the_best_rival_counts() -> None:
    given = {"grid": {"mb_s": 300.0}, "pool": {"mb_s": 100.0}, "dask": {"mb_s": 250.0}, "embedded": {"mb_s": 900.0}}
    assert bars(ROW["results"], given) == {"grid / best of all": (1.2, False)}


def test_the_serial_program_bounds_efficiency() -> None:
    given = {"grid": {"s": 10.0, "asked_workers": 2}, "serial": {"s": 18.0}, "pool": {"s": 11.0}, "polars": {"s": 5.0}}
    assert bars(ROW["words"], given)["efficiency against serial Python"] == (0.9, True)
    assert bars(ROW["words"], given)["seconds: grid / best Python engine"] == (pytest.approx(10 / 11), True)


def test_engines_that_disagree_are_named() -> None:
    found = Found(ROW["words"], [{"grid": {"s": 1.0, "check": "7"}, "pool": {"s": 1.0, "check": "7"}, "dask": {"check": "8"}}])
    assert report.disagreements([found]) == ["words: grid,pool / dask disagree"]
    assert report.disagreements([Found(ROW["words"], [{"grid": {"check": "7"}, "pool": {"check": "7"}}])]) == []


def test_a_table_has_failures_and_ratios() -> None:
    rounds = [{"grid": {"mb_s": 200.0}, "pool": {"mb_s": 100.0}}, {"grid": {"mb_s": 300.0}, "pool": {"mb_s": 100.0}}]
    lines = report.table(Found(ROW["results"], rounds, {"ray": "it broke"})).splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["grid", "250", "[200-300]"],
        ["pool", "2.50", "100", "[100-100]"],
        ["ray", "-", "it", "broke"],
    ]


@pytest.mark.parametrize("name", list(ENGINES))
def test_every_adapter_loads_without_its_engine(name: str) -> None:
    assert engine_class(name).name == name
    assert engine_class(name).rows <= {row.measure for row in ROWS}


def test_words_nobody_knows_are_named() -> None:
    assert chosen(["b,a", "c"], ["a", "b", "c", "d"], "row") == ["a", "b", "c"]
    assert chosen([], ["a", "b"], "row") == ["a", "b"]
    with pytest.raises(SystemExit, match="no row 'x'"):
        chosen(["x"], ["a"], "row")
