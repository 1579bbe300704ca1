"""A job of whose log this peer holds a replica, for those who watch it: its output so far, how it stands, how it ended.

Rules: everything here comes from the log (committed facts), so that all replicas say the same; who leads and what the
present leadership measures only the leader knows. The view is the one the job is led with when it is led here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dht.core.identity import PeerId
from grid.core.job import PENDING, RUNNING, JobId, JobSpec
from grid.describing import describe, peers_of, stages_of
from grid.jobview import JobView

if TYPE_CHECKING:
    from grid.core.chronicle import Chronicle
    from grid.replica import Replica

LEADERS_OWN = ("epoch", "leader", "replicas", "stages", "peers")
"""What only the leader measures, or knew last."""


class Followed:
    """One job followed here. `replica` is set once the log is here."""

    def __init__(self, job: JobId, spec: JobSpec, folder: Path, me: PeerId) -> None:
        self.job = job
        self.spec = spec
        self.folder = folder
        self.view = JobView(folder)
        self.replica: Replica | None = None
        self.shown: dict[str, Any] | None = None
        """What its leader told of it at its end, as the log has it."""
        self._me = me

    @property
    def chronicle(self) -> Chronicle | None:
        """What its log says."""
        return self.replica.chronicle if self.replica is not None else None

    @property
    def branch(self) -> bytes:
        """The name of the branch of its log; b"": the root."""
        return self.replica.branch.name if self.replica is not None else b""

    @property
    def state(self) -> str:
        """It runs as far as anybody who does not lead it can tell, once it did something."""
        log = self.chronicle
        begun = log is not None and bool(log.stages or any(log.output_length.values()))
        return RUNNING if self.view.state == PENDING and begun else self.view.state

    def describe(self) -> dict[str, Any]:
        """The object of `grid show --json`, without the schema."""
        replica, log = self.replica, self.chronicle
        stages, peers = (stages_of(log), peers_of(log)) if log is not None else ([], {})
        leader = replica.leader if replica is not None else None
        voters = replica.voters if replica is not None else (self._me,)
        epoch = replica.term if replica is not None else 0
        shown = describe(self.job, self.spec, self.view, epoch, leader, stages, peers, voters) | {"state": self.state}
        return shown | {key: self.shown[key] for key in LEADERS_OWN if key in self.shown} if self.shown else shown
