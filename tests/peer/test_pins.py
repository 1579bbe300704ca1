"""What a submission pinned in the store is let go when its job is over, or was never accepted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from grid.api.client import ControlError
from grid.blobs.store import BlobStore
from grid.peer import Peer
from grid.submission import job_options, make_spec


async def candidates(count: int) -> list[bytes]:
    return [bytes(20)] * count


def peer_with(store: BlobStore) -> Any:
    return SimpleNamespace(
        services=SimpleNamespace(store=store),
        membership=SimpleNamespace(grid=bytes(32), owner=bytes(20)),
        identity=SimpleNamespace(public=bytes(32)),
        owner_name="somebody",
        candidates=candidates,
    )


def submission(folder: Path) -> dict[str, Any]:
    (folder / "code.tar").write_bytes(b"code")
    (folder / "pack").write_bytes(b"pack" * 1000)
    return {
        "name": "job.py",
        "script": "job.py",
        "argv": [],
        "code": str(folder / "code.tar"),
        "pack_paths": [str(folder / "pack")],
        "python": "3.11",
        "lock": "six==1",
        "options": {"retries": 2, "timeout": 9.5},
    }


async def test_blobs_of_a_submission_are_pinned_together(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs", 1 << 30)
    spec, blobs = await make_spec(peer_with(store), submission(tmp_path), "submit:1")
    assert spec.options == job_options({"retries": 2, "timeout": 9.5})
    assert len(store) == 3
    assert {ref.id for ref in blobs} == set(store)  # all that the job needs wherever it is led
    assert all(store.pinned(blob) for blob in store)
    store.unpin("submit:1")
    assert not any(store.pinned(blob) for blob in store)


async def test_submission_whose_files_are_gone_pins_nothing(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs", 1 << 30)
    broken = submission(tmp_path) | {"code": str(tmp_path / "nothing")}
    with pytest.raises(ControlError, match="can't be read"):
        await make_spec(peer_with(store), broken, "submit:1")
    assert len(store) == 1  # the pack, which may go now
    assert not any(store.pinned(blob) for blob in store)


async def test_pins_are_let_go_when_the_job_is_over(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs", 1 << 30)
    blob = await store.put(b"input", owner="submit:1", durable=True)
    ended: list[Any] = []

    class Lead:
        view = SimpleNamespace(outcome=object())

        async def run(self) -> None:
            assert store.pinned(blob)

    peer = SimpleNamespace(services=SimpleNamespace(store=store), jobs=SimpleNamespace(ended=ended.append))
    lead = Lead()
    await Peer._lead(cast(Any, peer), cast(Any, lead), "submit:1")
    assert ended == [lead]
    assert not store.pinned(blob)
