"""Per-task seeds, and what they are applied to: the global generators of `random` and `numpy.random`.

A task's seed is a function of (job's seed, stage, index) alone, so results don't depend on how a stage was cut up or who ran
it. Seeding a Mersenne Twister costs 5 µs (numpy's 2 µs), more than a trivial task, and whether a task will draw can't be
known before: so the price is paid only in processes in which one of these modules was imported at all. An import hook
notices that, in the middle of a task if need be. Hashing is done once a stage; a task's seed is arithmetic on that.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

WATCHED = frozenset({"random", "numpy.random"})
_MASK = (1 << 64) - 1


def stage_seed(job_seed: int, stage: int) -> int:
    """64 bits from which the seeds of a stage's tasks are derived."""
    return int.from_bytes(hashlib.blake2b(f"{job_seed}/{stage}".encode(), digest_size=8).digest(), "big")


def task_seed(stage_seed: int, index: int) -> int:
    """64 bits for one task: a step of SplitMix64 (Steele, Lea, Flood 2014) from the stage's."""
    z = (stage_seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class Seeder:
    """Seeds the generators that this process has loaded. One a process: it hooks imports."""

    def __init__(self, job_seed: int) -> None:
        self.active = False
        """Whether there is a generator to seed: look before each task, call `seed` only then."""
        self._job_seed = job_seed
        self._stage = -1
        self._base = stage_seed(job_seed, -1)
        self._seed_of: Callable[[], int] | None = None
        self._random: Callable[[int], Any] | None = None
        self._numpy: Callable[[int], Any] | None = None
        for name in WATCHED:
            if name in sys.modules:
                self._loaded(name)
        sys.meta_path.insert(0, _ImportWatch(self._imported))

    def watch(self, seed_of: Callable[[], int]) -> None:
        """Seed what is loaded from now on with what `seed_of` returns at that moment."""
        self._seed_of = seed_of

    def of(self, stage: int, index: int) -> int:
        """The seed of a task."""
        if stage != self._stage:
            self._stage, self._base = stage, stage_seed(self._job_seed, stage)
        return task_seed(self._base, index)

    def seed(self, seed: int) -> None:
        """Seed what is loaded."""
        for name in WATCHED:
            self._seed_one(name, seed)

    def _seed_one(self, name: str, seed: int) -> None:
        if name == "random":
            if self._random is not None:
                self._random(seed)
        elif self._numpy is not None:
            self._numpy(seed & 0xFFFFFFFF)  # all that the legacy generator takes

    def _imported(self, name: str) -> None:
        self._loaded(name)
        if self._seed_of is not None:
            self._seed_one(name, self._seed_of())  # that one alone: the other one may have been drawn from, or seeded, since

    def _loaded(self, name: str) -> None:
        module = sys.modules.get(name)
        seed = getattr(module, "seed", None)  # a user's own random.py may have none
        if not callable(seed):
            return
        if name == "random":
            self._random = seed
        else:
            self._numpy = seed
        self.active = True


class _ImportWatch:
    """First in sys.meta_path: lets the others find a watched module and tells when it has been executed."""

    def __init__(self, imported: Callable[[str], None]) -> None:
        self._imported = imported

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Part of the import protocol."""
        if name not in WATCHED:
            return None
        for finder in sys.meta_path:
            if finder is not self:
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _Loader(spec.loader, self._imported)  # type: ignore[assignment]
                    return spec
        return None


class _Loader:
    """Stands in for a module's loader until the module has been executed."""

    def __init__(self, loader: Any, imported: Callable[[str], None]) -> None:
        self._loader = loader
        self._imported = imported

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Part of the import protocol."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Part of the import protocol."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._imported(module.__name__)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
