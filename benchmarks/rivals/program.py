"""Us and our rivals side by side, in one run.

    python -m benchmarks rivals                                        # everything, an hour
    python -m benchmarks rivals --only round_trip,submits --rounds 5
    python -m benchmarks rivals --engines grid,pool,ray --only words --corpus ~/src/linux
    python -m benchmarks rivals --small                                # every row with tiny sizes: does it work at all?

Each round measures each row with one engine after the other, the order turning from round to round; every engine has a process
of its own, only one runs at a time, and it and all its descendants are ended before the next begins. Figures are medians of the
rounds, with the least and the largest; the ratios of the bars are taken within a round. Engines: grid is `grid submit` to a
running peer with two workers, the ledger replicated on two more peers; grid-3 three peers that share the work, a worker each;
grid-files the same as grid with the job's inputs given by --file; embedded is `python job.py`; bare and serial are plain loops.

The word count needs --corpus: a folder of text. Its text files (valid UTF-8, of the suffixes below) are linked or copied, in
the order of their paths, up to --corpus-mb, into a folder that all engines read.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.rivals import report, work
from benchmarks.rivals.engines import ENGINES, engine_class
from benchmarks.rivals.report import Found
from benchmarks.rivals.rows import ROWS, Row
from benchmarks.rivals.session import Failed, Session

SUFFIXES = (".c", ".h", ".S", ".py", ".rs", ".rst", ".md", ".txt", ".html", ".json", ".sh", ".pl", ".dts", ".dtsi", ".yaml")
FAILURES_MAX = 2
"""An engine that fails a row so often is not asked again."""


def corpus(folder: Path, into: Path, megabytes: float) -> tuple[int, int]:
    """Gather the text files; return how many, and their bytes."""
    files = size = 0
    for path, length in zip(*work.corpus_files(str(folder)), strict=True):
        if not path.endswith(SUFFIXES) or not length:
            continue
        try:
            Path(path).read_bytes().decode()
        except (UnicodeDecodeError, OSError):
            continue
        place = into / f"{files // 1000:04}"
        place.mkdir(exist_ok=True)
        target = place / f"{files % 1000:03}{os.path.splitext(path)[1]}"
        try:
            os.link(path, target)
        except OSError:
            shutil.copyfile(path, target)
        files, size = files + 1, size + length
        if size >= megabytes * 1e6:
            break
    return files, size


class Run:
    """The rounds."""

    def __init__(self, options: argparse.Namespace, engines: list[str], rows: list[Row], corpus_folder: Path | None) -> None:
        self.options = options
        self.engines = engines
        self.corpus = corpus_folder
        self.found = {row.key: Found(row) for row in rows}
        self.failed: dict[tuple[str, str], int] = {}

    def round(self, number: int) -> None:
        """All rows, with all engines."""
        rows = [found.row for found in self.found.values() if number < found.row.rounds_max]
        for row in rows:
            self.found[row.key].rounds.append({})
        turned = self.engines[number % len(self.engines) :] + self.engines[: number % len(self.engines)]
        for _, members in groupby(rows, key=lambda row: row.group or row.key):
            group = list(members)
            for engine in turned:
                left = [row for row in group if self.asks(engine, row)]
                while left:
                    left = self.session(engine, left)

    def asks(self, engine: str, row: Row) -> bool:
        """Does this engine take part in this row?"""
        if row.measure == "words" and self.corpus is None:
            return False
        return row.measure in engine_class(engine).rows and self.failed.get((engine, row.key), 0) < FAILURES_MAX

    def params(self, row: Row) -> dict[str, Any]:
        """A row's sizes."""
        params = {**row.params, **(row.small if self.options.small else {})}
        if row.measure == "words":
            params["corpus"] = str(self.corpus)
        if row.measure == "efficiency":
            params["cpu"] = self.options.spin == "cpu"
        return params

    def session(self, engine: str, rows: list[Row]) -> list[Row]:
        """Measure rows in one process of the engine, until one fails; return those that are left."""
        left = list(rows)
        with contextlib.suppress(Failed), Session(engine, self.options.workers) as session:
            while left:
                self.ask(session, left.pop(0))
        return left

    def ask(self, session: Session, row: Row) -> None:
        """Measure one. Raises Failed."""
        engine, found = session.engine, self.found[row.key]
        began = time.monotonic()
        try:
            reply = session.ask(row.key, row.measure, self.params(row), row.within_s)
            if "error" in reply:
                raise Failed(reply["error"])
        except Failed as error:
            self.failed[engine, row.key] = self.failed.get((engine, row.key), 0) + 1
            found.failures[engine] = str(error)
            print(f"{row.key:12} {engine:12} fails: {report.short(str(error))}", file=sys.stderr, flush=True)
            raise
        if "values" in reply:
            found.rounds[-1][engine] = {**reply["values"], "asked_workers": self.options.workers}
            metric = row.metrics[0]
            value = report.dig(reply["values"], metric.key)
            shown = report.number(value, metric.digits) if isinstance(value, float | int) else value
            took = f"({time.monotonic() - began:.1f} s)"
            print(f"{row.key:12} {engine:12} {shown} {metric.label} {took}", file=sys.stderr, flush=True)

    def tell(self, absent: Sequence[str]) -> None:
        """Print all there is."""
        found = [each for each in self.found.values() if each.engines()]
        rounds = max((len(each.rounds) for each in found), default=0)
        where = report.machine()
        print(f"{where['date']}, {where['cores']} cores, {where['cpu']}, Python {where['python']}, {rounds} rounds")
        print(", ".join(f"{name} {version}" for name, version in report.versions(self.engines).items()))
        if absent:
            print(f"not installed, left out: {', '.join(absent)}")
        for line in report.disagreements(found):
            print(f"WRONG RESULTS: {line}")
        if rounds < report.FEW_ROUNDS:
            print(f"only {rounds} round(s): the spread says little")
        if self.options.small:
            print("small sizes: the figures mean nothing")
        print(f"\n{report.verdicts(found)}")
        for each in found:
            print(f"\n{report.table(each)}")


def chosen(given: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    """What was asked for, in the table's order. Ends the program over a word nobody knows."""
    asked = [word for words in given for word in words.split(",") if word]
    for word in asked:
        if word not in known:
            raise SystemExit(f"there is no {what} {word!r}: {', '.join(known)}")
    return [name for name in known if not asked or name in asked]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks rivals", description=__doc__, formatter_class=form)
    parser.add_argument("--only", metavar="ROW", nargs="+", default=[], help=f"of {', '.join(row.key for row in ROWS)}")
    parser.add_argument("--engines", metavar="ENGINE", nargs="+", default=[], help=f"of {', '.join(ENGINES)}")
    parser.add_argument("--rounds", type=int, default=3, help="default 3; some long rows have fewer")
    parser.add_argument("--workers", type=int, default=2, help="of every engine (default 2)")
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="for the word count")
    parser.add_argument("--corpus-mb", type=float, default=513.0, metavar="MB", help="at most so much of it (default 513)")
    parser.add_argument("--spin", choices=("wall", "cpu"), default="wall", help="what tasks of 1 ms take: time, or CPU time")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that all works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there, after each round")
    options = parser.parse_args(arguments)
    rows = chosen(options.only, [row.key for row in ROWS], "row")
    asked = chosen(options.engines, list(ENGINES), "engine")
    absent = [name for name in asked if not engine_class(name).installed()]
    engines = [name for name in asked if name not in absent]
    if "words" in rows and options.corpus is None:
        print("no --corpus DIR: the word count is left out", file=sys.stderr)
        rows.remove("words")
    if not rows or not engines:
        raise SystemExit("nothing to measure")
    with tempfile.TemporaryDirectory(prefix="rivals-corpus-", dir=near(options.corpus)) as folder:
        if "words" in rows:
            files, size = corpus(options.corpus, Path(folder), options.corpus_mb)
            print(f"corpus: {files:,} files, {size / 1e6:.0f} MB", file=sys.stderr)
        run = Run(options, engines, [row for row in ROWS if row.key in rows], Path(folder) if "words" in rows else None)
        given = {name: value for name, value in vars(options).items() if name not in ("json", "corpus")}
        try:
            for number in range(options.rounds):
                run.round(number)
                if options.json is not None:
                    told = report.as_json(list(run.found.values()), engines, absent, given)
                    options.json.write_text(json.dumps(told, indent=1) + "\n")
        finally:
            run.tell(absent)


def near(folder: Path | None) -> str | None:
    """A place beside the corpus, where links work; None (the usual place) where it can't be written to."""
    parent = folder.resolve().parent if folder is not None else None
    return str(parent) if parent is not None and os.access(parent, os.W_OK) else None
