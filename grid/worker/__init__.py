"""Child processes of a job: fork servers, worker and driver children, their environments, and the pool that owns them.

`pool`, `fork_server`, `process`, `memory`, `environment` and `sandbox` run in the peer. `bootstrap`, `zygote`, `child`,
`driver_child` and what they import run in processes that execute users' code: standard library, msgspec, cloudpickle
and `grid.api` only.
"""
