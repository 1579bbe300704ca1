"""What a run found: ratios first, then a table a row; the same as JSON.

Every figure is the median of the rounds, with the least and the largest beside it.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.rivals.engines import ENGINES, OURS, engine_class
from benchmarks.rivals.rows import Bar, Metric, Round, Row

SCHEMA = 1
FEW_ROUNDS = 3
"""With fewer a spread says little."""


@dataclass
class Found:
    """All rounds of one row."""

    row: Row
    rounds: list[dict[str, Mapping[str, Any]]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def engines(self) -> list[str]:
        """Who measured something, or failed, in the table's order."""
        return [name for name in ENGINES if name in self.failures or any(name in each for each in self.rounds)]

    def samples(self, engine: str, key: str) -> list[Any]:
        """One figure of every round that has it."""
        found = (dig(each.get(engine, {}), key) for each in self.rounds)
        return [value for value in found if value is not None]


def dig(values: Any, key: str) -> Any:
    """Look up "a.b"."""
    for part in key.split("."):
        if not isinstance(values, Mapping):
            return None
        values = values.get(part)
    return values


def number(value: float, digits: int) -> str:
    """For people."""
    return f"{value:,.{digits}f}"


def spread(samples: Sequence[float], digits: int) -> str:
    """Median [least-largest]."""
    middle = number(statistics.median(samples), digits)
    if len(samples) < 2:
        return middle
    return f"{middle} [{number(min(samples), digits)}-{number(max(samples), digits)}]"


def machine() -> dict[str, Any]:
    """Where and when."""
    model = ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        pass
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"), "system": platform.platform(), "python": platform.python_version(),
        "cpu": model or platform.processor() or platform.machine(), "cores": os.cpu_count(), "load_before": os.getloadavg()[0],
    }  # fmt: skip


def versions(engines: Sequence[str]) -> dict[str, str]:
    """Of all packages that took part."""
    found: dict[str, str] = {}
    for name in engines:
        found.update(engine_class(name).versions())
    return found


def judged(bar: Bar, rounds: Sequence[Round]) -> dict[str, Any]:
    """A bar's value in each round, and whether their median reaches it."""
    values = [value for each in rounds if (value := bar.value(each)) is not None]
    middle = statistics.median(values) if values else None
    return {
        "bar": bar.label, "sense": bar.sense, "limit": bar.limit, "values": values, "median": middle,
        "reached": None if middle is None else bar.reached(middle),
    }  # fmt: skip


def verdicts(found: Sequence[Found]) -> str:
    """The bars of all rows."""
    lines = [("measure", "ratio or figure", "median [spread]", "bar", "reached")]
    for each in found:
        for bar in each.row.bars:
            told = judged(bar, each.rounds)
            shown = spread(told["values"], 3) if told["values"] else "-"
            said = {None: "not measured", True: "yes", False: "NO"}[told["reached"]]
            lines.append((each.row.title, bar.label, shown, f"{bar.sense} {bar.limit:g}", said))
    return aligned(lines)


def cell(found: Found, engine: str, metric: Metric) -> str:
    """One engine's figure."""
    samples = found.samples(engine, metric.key)
    if not samples:
        return "-"
    if isinstance(samples[-1], str):
        return str(samples[-1])
    return spread([value * metric.scale for value in samples], metric.digits)


def beside(found: Found, engine: str, metric: Metric) -> str:
    """How many times as good ours is: the median over the rounds of both."""
    ours = next((name for name in OURS if found.samples(name, metric.key)), "")
    if not metric.better or not ours or engine == ours:
        return ""
    ratios = []
    for each in found.rounds:
        mine, theirs = dig(each.get(ours, {}), metric.key), dig(each.get(engine, {}), metric.key)
        if mine and theirs and mine > 0 and theirs > 0:
            ratios.append(theirs / mine if metric.better == "low" else mine / theirs)
    return f"{statistics.median(ratios):.2f}" if ratios else ""


def table(found: Found) -> str:
    """One row's engines."""
    metrics = [metric for metric in found.row.metrics if any(found.samples(name, metric.key) for name in found.engines())]
    if not metrics:
        metrics = list(found.row.metrics[:1])
    leading = metrics[0]
    lines = [("", f"ours better by ({leading.label})", *(metric.label for metric in metrics), "")]
    for engine in found.engines():
        cells = [cell(found, engine, metric) for metric in metrics]
        lines.append((engine, beside(found, engine, leading), *cells, short(found.failures.get(engine, ""))))
    notes = "".join(f"  ({note})\n" for note in found.row.notes)
    return f"{found.row.title}\n{notes}{aligned(lines)}"


def short(text: str) -> str:
    """Failures fit on a line."""
    return text if len(text) <= 100 else text[:97] + "..."


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def disagreements(found: Sequence[Found]) -> list[str]:
    """Engines whose results differ from the others' (told by "check")."""
    told: list[str] = []
    for each in found:
        checks: dict[str, list[str]] = {}
        for one in each.rounds:
            for engine, values in one.items():
                if "check" in values:
                    checks.setdefault(values["check"], []).append(engine)
        if len(checks) > 1:
            told.append(f"{each.row.key}: {' / '.join(','.join(sorted(set(who))) for who in checks.values())} disagree")
    return told


def as_json(found: Sequence[Found], engines: Sequence[str], absent: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """The whole run."""
    return {
        "schema": SCHEMA, "machine": machine(), "versions": versions(engines), "options": dict(options), "absent": list(absent),
        "disagreements": disagreements(found),
        "rows": [
            {
                "row": each.row.key, "title": each.row.title, "rounds": each.rounds, "failures": each.failures,
                "bars": [judged(bar, each.rounds) for bar in each.row.bars],
            }
            for each in found
        ],
    }  # fmt: skip
