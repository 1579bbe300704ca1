"""Ray on this machine: tasks, its multiprocessing pool for short ones, its object store for arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.rivals import work
from benchmarks.rivals.engines.base import ALL, Engine

STORE_BYTES = 2 << 30
STORE_MANY_BYTES = 100 << 20
NODES_READY_S = 300
ADDRESS = "127.0.0.2"
"""Loopback: for 127.0.0.1 Ray would take the address of a network interface."""


class Ray(Engine):
    """`ray.init` without its dashboard."""

    name = "ray"
    modules = ("ray",)
    packages = ("ray",)
    rows = ALL | {"many_workers"}

    def start(self) -> None:
        ray = self._import()
        ray.init(  # "local": never one that another program left running
            address="local", num_cpus=self.workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
            object_store_memory=STORE_BYTES, _node_ip_address=ADDRESS,
        )  # fmt: skip

    def start_many(self, nodes: int, slots: int) -> None:
        ray = self._import()
        from ray.cluster_utils import Cluster

        self.nodes = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": slots,
                "object_store_memory": STORE_MANY_BYTES,
                "include_dashboard": False,
                "node_ip_address": ADDRESS,
            },
        )
        for _ in range(nodes - 1):
            self.nodes.add_node(
                wait=False,
                num_cpus=slots,
                object_store_memory=STORE_MANY_BYTES,
                node_ip_address=ADDRESS,
            )
        self.nodes.wait_for_nodes(timeout=NODES_READY_S)
        ray.init(address=self.nodes.address, log_to_driver=False, logging_level="ERROR")

    def _import(self) -> Any:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # else `uv run` above us makes it build an environment
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self.ray: Any = ray
        self.functions: dict[Any, Any] = {}
        self._pool: Any = None
        return ray

    @property
    def pool(self) -> Any:
        """Its actors ask for no CPU, so that plain tasks run beside them."""
        if self._pool is None:
            from ray.util.multiprocessing import Pool

            self._pool = Pool(self.workers, ray_remote_args={"num_cpus": 0})
        return self._pool

    def stop(self) -> None:
        if self._pool is not None:
            self._pool.terminate()
        self.ray.shutdown()

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        remote = self.functions.get(function)
        if remote is None:
            remote = self.functions[function] = self.ray.remote(function)
        return remote.remote(*args)

    def result(self, handle: Any) -> Any:
        return self.ray.get(handle)

    def gather(self, handles: Sequence[Any]) -> list[Any]:
        found: list[Any] = self.ray.get(list(handles))
        return found

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        return self.gather([self.submit(function, item) for item in items])

    def map_quick(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        found: list[Any] = self.pool.map(function, items)
        return found

    def map_integers(self, count: int) -> dict[str, tuple[int, Callable[[], Iterable[int]]]]:
        def lists() -> Iterable[int]:
            for part in self.map(work.increment_all, list(work.chunks(range(count), 10_000))):
                yield from part

        return {
            "Pool": (count, lambda: self.map_quick(work.increment, range(count))),
            "lists by hand": (count, lists),
        }

    def checksum(self, array: Any) -> int:
        return int(self.result(self.submit(work.checksum, self.ray.put(array))))
