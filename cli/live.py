"""The live view of a grid: peers with their slots, jobs with their progress, throughput over the last minute.

Drawn with rich from what the peer's `status` says; `grid join` and `grid status --watch` show it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cli.console import STATE_STYLES, clean, format_age, format_count, job_state, owner_of, short

HISTORY_SAMPLES = 60
"""One a second: the sparkline spans a minute."""
PEERS_SHOWN_MAX = 16
JOBS_SHOWN_MAX = 10
BAR_CHARS = 16
_SPARKS = " ▁▂▃▄▅▆▇█"


class GridView:
    """Turns successive status objects into something to look at."""

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=HISTORY_SAMPLES)
        self._done: dict[str, int] = {}
        self._at_s = 0.0
        self.status: Mapping[str, Any] = {}

    def update(self, status: Mapping[str, Any], now_s: float | None = None) -> None:
        """Take in a status object read at `now_s` (monotonic)."""
        now_s = time.monotonic() if now_s is None else now_s
        done = {str(job.get("id", "")): int(job.get("done") or 0) for job in status.get("jobs", ())}
        if self._at_s and now_s > self._at_s:
            gained = sum(max(count - self._done.get(job, 0), 0) for job, count in done.items())
            self._rates.append(gained / (now_s - self._at_s))
        self._done, self._at_s, self.status = done, now_s, status

    def render(self, footer: str = "") -> RenderableType:
        """Return the view, with a last line of the caller's."""
        parts: list[RenderableType] = [Text(""), self._head(), Text(""), self._peers(), Text("")]
        if self.status.get("jobs"):
            parts += [self._jobs(), Text("")]
        parts.append(self._throughput())
        if footer:
            parts.append(Text(footer, style="dim"))
        return Group(*parts)

    def _head(self) -> Text:
        peers = self.status.get("peers", ())
        total = sum(_slots(peer)[1] for peer in peers)
        busy = sum(_slots(peer)[0] for peer in peers)
        head = Text("grid ", style="bold")
        head.append(short(str(self.status.get("grid", ""))), style="bold cyan")
        head.append(f"   {len(peers)} peer{'s' * (len(peers) != 1)}   {busy}/{total} slots busy", style="default")
        return head

    def _peers(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for title in ("peer", "name", "state", "slots", "", "leads", "address", "owner"):
            table.add_column(title, no_wrap=True)
        peers = list(self.status.get("peers", ()))
        for peer in peers[:PEERS_SHOWN_MAX]:
            busy, total = _slots(peer)
            state = clean(str(peer.get("state", "")))
            own = peer.get("id") == self.status.get("self")
            table.add_row(
                Text(short(str(peer.get("id", ""))), style="bold" if own else ""),
                clean(str(peer.get("name", ""))) + (" (this)" if own else ""),
                Text(state, style=_style(state)),
                _bar(busy, total, "green"),
                f"{busy}/{total}",
                " ".join(short(str(job)) for job in peer.get("leads", ())) or "-",
                clean(str(peer.get("address", ""))),
                owner_of(peer),
            )
        if len(peers) > PEERS_SHOWN_MAX:
            table.add_row("…", f"and {len(peers) - PEERS_SHOWN_MAX} more")
        return table

    def _jobs(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for title in ("job", "name", "state", "tasks", "", "failed", "leader", "age"):
            table.add_column(title, no_wrap=True)
        order = {"running": 0, "pending": 1}
        jobs = sorted(self.status.get("jobs", ()), key=lambda job: order.get(str(job.get("state")), 2))
        for job in jobs[:JOBS_SHOWN_MAX]:
            done, total = int(job.get("done") or 0), int(job.get("total") or 0)
            failed = int(job.get("failed") or 0)
            state = clean(job_state(job))
            table.add_row(
                short(str(job.get("id", ""))),
                clean(str(job.get("name", ""))),
                Text(state, style=_style(state)),
                _bar(done, total, "cyan"),
                f"{format_count(done)}/{format_count(total)}",
                Text(str(failed) if failed else "-", style="red" if failed else ""),
                short(str(job.get("leader") or "-")),
                format_age(job.get("submitted_s")),
            )
        return table

    def _throughput(self) -> Text:
        text = Text("tasks/s ", style="dim")
        peak = max(self._rates, default=0.0)
        for rate in self._rates:
            level = 0 if peak <= 0 or rate <= 0 else max(1, round(rate / peak * (len(_SPARKS) - 1)))
            text.append(_SPARKS[level], style="cyan")
        if self._rates:
            text.append(f" {format_count(self._rates[-1])}/s", style="bold")
            text.append(f"  peak {format_count(peak)}/s", style="dim")
        return text


def _slots(peer: Mapping[str, Any]) -> tuple[int, int]:
    slots = peer.get("slots") or {}
    return int(slots.get("busy") or 0), int(slots.get("total") or 0)


def _bar(part: int, whole: int, style: str) -> Text:
    filled = min(BAR_CHARS, round(part / whole * BAR_CHARS)) if whole > 0 else 0
    bar = Text("█" * filled, style=style)
    return bar.append("░" * (BAR_CHARS - filled), style="bright_black")


def _style(state: str) -> str:
    return STATE_STYLES.get(state, "")
