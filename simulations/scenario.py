"""Scenarios: what a world is made of, what its jobs do, what befalls it. TOML files in `scenarios/`, checked when read."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec

FOLDER = Path(__file__).with_name("scenarios")


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One job. `submitter`: a host's number; -1: any. `tasks` and `mean_s` are of one run of the program."""

    program: str = "sums"
    tasks: int = 120
    mean_s: float = 0.2
    at_s: float = 2.0
    submitter: int = -1
    replicas: int = 5
    strict: bool = False
    retries: int = 0


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All links of the network. Chances are of one datagram: streams know latency and jitter only."""

    latency_s: float = 0.002
    jitter_s: float = 0.003
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0


class Disk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All disks. Chances are of one fsync or step of the journal."""

    latency_s: float = 0.0005
    jitter_s: float = 0.001
    stall: float = 0.0
    stall_s: float = 1.0
    failure: float = 0.0


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One process of faults, of a kind in `simulations.faults`. `options` are that kind's."""

    kind: str
    options: dict[str, Any] = {}


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A world. Faults happen until `faults_s` or until all jobs are final; then all heals and `settle_s` must do.

    dht: the real DHT instead of a directory. followers: users that follow each job (0: one on every machine). small_batches:
    one log entry a message, snapshots soon and in small chunks, so that what a message holds doesn't hide an order.
    """

    name: str
    about: str
    peers: int = 5
    slots: int = 2
    faults_s: float = 60.0
    settle_s: float = 120.0
    dht: bool = False
    followers: int = 0
    small_batches: bool = False
    in_swarm: bool = True
    link: Link = Link()
    disk: Disk = Disk()
    job: tuple[Job, ...] = (Job(),)
    fault: tuple[Fault, ...] = ()


def names(swarm: bool = False) -> list[str]:
    """All scenarios, or those that swarms run."""
    found = sorted(path.stem for path in FOLDER.glob("*.toml"))
    return [name for name in found if load(name).in_swarm] if swarm else found


def load(name: str) -> Scenario:
    """Raises FileNotFoundError, msgspec.ValidationError."""
    data = tomllib.loads((FOLDER / f"{name}.toml").read_text("utf-8"))
    for fault in data.get("fault", ()):
        kind = fault.pop("kind")
        options = dict(fault)
        fault.clear()
        fault.update(kind=kind, options=options)
    return msgspec.convert({"name": name, **data}, Scenario)
