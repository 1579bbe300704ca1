"""Input files: manifests from strangers, extraction below one folder, many tasks at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from grid.blobs import extract, inputs
from grid.blobs.blob import BlobId, BlobUnavailable, StoreFull, blob_id
from grid.blobs.inputs import InputTree
from grid.blobs.manifest import Manifest
from grid.blobs.store import BlobStore
from tests.blobs.faulty import FaultyDisk
from tests.blobs.helpers import BIG, bytes_of, content

MakeStore = Callable[..., BlobStore]
HEX = blob_id(b"").hex()


class Packs:
    """Packs come out of the store, and are counted."""

    def __init__(self, store: BlobStore) -> None:
        self.store = store
        self.asked: list[bytes] = []

    async def path(self, blob: bytes, size: int) -> Path:
        self.asked.append(blob)
        await trio.lowlevel.checkpoint()
        path = await self.store.path(BlobId(blob))
        if path is None:
            raise BlobUnavailable(BlobId(blob), {})
        assert self.store.size(BlobId(blob)) == size
        return path


class Job:
    """Input files in packs, their manifest, and a tree that extracts them."""

    def __init__(self, tmp_path: Path, store: BlobStore) -> None:
        self.store = store
        self.packs = Packs(store)
        self.folder = tmp_path / "job" / "inputs"
        self.path = tmp_path / "manifest"
        self.rows: list[list[Any]] = []
        self.files: dict[str, bytes] = {}

    async def pack(self, **files: bytes) -> BlobId:
        blob = await self.store.put(b"".join(files.values()), durable=True)
        offset = 0
        for name, data in files.items():
            self.rows.append([name, len(data), blob.hex(), offset])
            self.files[name] = data
            offset += len(data)
        return blob

    async def open(self) -> InputTree:
        self.path.write_text(json.dumps(self.rows))
        return await InputTree.open(self.store, self.packs, self.path, self.folder)

    def extracted(self) -> dict[str, bytes]:
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}


@pytest.fixture
def job(tmp_path: Path, make: MakeStore) -> Job:
    return Job(tmp_path, make())


async def test_files_are_extracted_whole_and_read_only(job: Job) -> None:
    await job.pack(**{"a.txt": b"alpha", "deep/er/b.txt": bytes_of(BIG), "deep/empty": b"", "@up1/c": b"c"})
    tree = await job.open()
    for name, data in job.files.items():
        path = await tree.materialize(name)
        assert path == job.folder / name
        assert path.read_bytes() == data
        assert path.stat().st_mode & 0o777 == 0o444
    assert job.extracted() == job.files, "and nothing else is left in the folder"


async def test_neighbours_come_along(job: Job) -> None:
    await job.pack(**{f"{n:03}.txt": str(n).encode() for n in range(50)})
    tree = await job.open()
    await tree.materialize("010.txt")
    assert sorted(job.extracted()) == [f"{n:03}.txt" for n in range(10, 50)]
    await tree.materialize("020.txt")
    assert len(job.packs.asked) == 1
    await tree.materialize("000.txt")
    assert job.extracted() == job.files
    assert len(job.packs.asked) == 2


async def test_neighbours_are_bounded(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "NEIGHBOURS_MAX", 3)
    monkeypatch.setattr(inputs, "NEIGHBOURS_BYTES_MAX", 1000)
    await job.pack(**{f"{n:02}": b"x" for n in range(10)})
    await job.pack(big=bytes(2000), small=b"x")
    tree = await job.open()
    await tree.materialize("00")
    assert sorted(job.extracted()) == ["00", "01", "02", "03"]
    await tree.materialize("big")
    assert "small" not in job.extracted()


async def test_file_that_is_a_whole_pack_is_not_copied(job: Job) -> None:
    blob = await job.pack(huge=bytes_of(5 * BIG))
    tree = await job.open()
    path = await tree.materialize("huge")
    stored = await job.store.path(blob)
    assert stored is not None
    assert path.read_bytes() == bytes_of(5 * BIG)
    assert path.samefile(stored) or stored.stat().st_nlink == 1  # a link, or a reflink where the file system has them
    assert await content(job.store, blob) == bytes_of(5 * BIG)


@pytest.mark.parametrize("in_kernel", [True, False])
async def test_without_links_and_kernel_copies(job: Job, monkeypatch: pytest.MonkeyPatch, in_kernel: bool) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(extract.os, "link", refuse)
    monkeypatch.setattr(extract, "fcntl", None)
    if not in_kernel:
        monkeypatch.setattr(extract.os, "copy_file_range", refuse)
        monkeypatch.setattr(extract, "COPY_BYTES", 1000)
    await job.pack(whole=bytes_of(BIG))
    await job.pack(one=b"1" * 5000, two=b"2" * 5000)
    tree = await job.open()
    for name, data in job.files.items():
        assert (await tree.materialize(name)).read_bytes() == data
    assert job.extracted() == job.files


async def test_many_tasks_at_once(job: Job) -> None:
    await job.pack(**{f"{n}": bytes([n]) * 100 for n in range(100)})
    tree = await job.open()

    async def use(name: str) -> None:
        assert (await tree.materialize(name)).read_bytes() == job.files[name]

    async with trio.open_nursery() as nursery:
        for name in job.files:
            for _ in range(3):
                nursery.start_soon(use, name)
    assert job.extracted() == job.files
    assert len(job.packs.asked) == 1  # who comes first brings what all others wait for


async def test_asking_again_costs_no_fetch_and_mends_what_was_deleted(job: Job) -> None:
    await job.pack(a=b"alpha")
    tree = await job.open()
    path = await tree.materialize("a")
    assert await tree.materialize("a") == path
    assert len(job.packs.asked) == 1
    path.unlink()
    assert (await tree.materialize("a")).read_bytes() == b"alpha"
    path.unlink()
    path.write_bytes(b"ALPHA")  # writable: not ours
    assert (await tree.materialize("a")).read_bytes() == b"alpha"


async def test_what_stood_there_before_a_restart_is_not_trusted(job: Job) -> None:
    await job.pack(a=b"alpha")
    job.folder.mkdir(parents=True)
    (job.folder / "a").write_bytes(b"wrong")
    (job.folder / "a").chmod(0o444)
    tree = await job.open()
    assert (await tree.materialize("a")).read_bytes() == b"alpha"


async def test_unknown_name_is_a_clear_error(job: Job) -> None:
    await job.pack(a=b"alpha")
    tree = await job.open()
    for name in ("b", "", "/etc/passwd", "../manifest", "a/"):
        with pytest.raises(FileNotFoundError, match="--file"):
            await tree.materialize(name)


async def test_pack_that_is_nowhere(job: Job) -> None:
    job.rows = [["a", 1, HEX, 5]]
    tree = await job.open()
    with pytest.raises(BlobUnavailable):
        await tree.materialize("a")
    with pytest.raises(BlobUnavailable):
        await tree.prefetch(bytes.fromhex(HEX))
    assert job.extracted() == {}


async def test_prefetch_brings_packs_only(job: Job) -> None:
    blob = await job.pack(a=b"alpha")
    tree = await job.open()
    await tree.prefetch(blob)
    await tree.prefetch(blob_id(b"something else"))
    assert job.packs.asked == [blob]


async def test_links_planted_in_the_folder_are_not_followed(job: Job, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "target").write_bytes(b"precious")
    await job.pack(**{"dir/a": b"alpha", "b": b"beta"})
    tree = await job.open()
    (job.folder / "dir").symlink_to(outside)
    (job.folder / "b").symlink_to(outside / "target")
    with pytest.raises(OSError, match=r"Not a directory|symbolic"):
        await tree.materialize("dir/a")
    assert (await tree.materialize("b")).read_bytes() == b"beta"
    assert not (job.folder / "b").is_symlink()
    assert [p.name for p in outside.iterdir()] == ["target"]
    assert (outside / "target").read_bytes() == b"precious"


async def test_pack_shorter_than_its_files(job: Job) -> None:
    blob = await job.store.put(b"short", durable=True)
    job.rows = [["a", 5, blob.hex(), 0], ["b", 10, blob.hex(), 0]]

    class Careless(Packs):
        async def path(self, blob: bytes, size: int) -> Path:
            path = await self.store.path(BlobId(blob))
            assert path is not None
            return path

    job.packs = Careless(job.store)
    tree = await job.open()
    with pytest.raises(OSError, match="ends before"):
        await tree.materialize("b")
    assert job.extracted().keys() <= {"a"}


async def test_full_disk_is_told(job: Job, monkeypatch: pytest.MonkeyPatch, disk: FaultyDisk) -> None:
    await job.pack(a=b"alpha", b=b"beta")
    tree = await job.open()

    def full(*args: object, **options: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(extract.os, "copy_file_range", full)
        with pytest.raises(StoreFull, match="the disk is full"):
            await tree.materialize("a")
    assert job.extracted() == {}
    assert (await tree.materialize("a")).read_bytes() == b"alpha"


# ---- manifests from strangers ----

BAD_ROWS: list[Any] = [
    {},
    [["a", 1, HEX]],
    [["a", "1", HEX, 0]],
    [["a", 1, "zz", 0]],
    [["a", -1, HEX, 0]],
    [["a", 1, HEX, -1]],
    [["a", 1, HEX, 1 << 62]],
    [["a", 1.5, HEX, 0]],
    [["a", 1, HEX, 0], ["a", 1, HEX, 0]],
    [["a", 1, HEX, 0], ["a/b", 1, HEX, 0]],
    [["a/b/c", 1, HEX, 0], ["a", 1, HEX, 0]],
    *([[name, 1, HEX, 0]] for name in ("", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "../a", "a/.", "a\0b")),
    [["x" * 256, 1, HEX, 0]],
    [["x/" * 2000 + "x", 1, HEX, 0]],
    [["\ud800", 1, HEX, 0]],
]


@pytest.mark.parametrize("rows", BAD_ROWS, ids=repr)
def test_manifest_is_refused(tmp_path: Path, rows: Any) -> None:
    path = tmp_path / "manifest"
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"input|blob name") as caught:
        Manifest.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"[", b"\xff", b"[" * 100_000])
def test_manifest_that_is_no_json(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "manifest"
    path.write_bytes(text)
    with pytest.raises(ValueError, match="can't be read"):
        Manifest.read(path)


def test_manifest_may_grow_columns_and_odd_names(tmp_path: Path) -> None:
    path = tmp_path / "manifest"
    odd = os.fsdecode(b"caf\xe9 \n\xc3\xa9")
    path.write_text(json.dumps([[odd, 1, HEX, 0, "new"], ["@/etc/x", 2, HEX, 1], ["...", 0, HEX, 3]]))
    manifest = Manifest.read(path)
    assert set(manifest.files) == {odd, "@/etc/x", "..."}
    assert manifest.packs[blob_id(b"")].size == 3


@given(st.lists(st.sampled_from(["a", "b", "..", ".", "", "c d", "\0", "~", "é"]), min_size=1, max_size=5))
def test_no_accepted_name_leaves_the_folder(parts: list[str]) -> None:
    name = "/".join(parts)
    rows = json.dumps([[name, 1, HEX, 0]])
    read, write = os.pipe()
    os.write(write, rows.encode())
    os.close(write)
    try:
        manifest = Manifest.read(Path(f"/dev/fd/{read}"))
    except ValueError:
        return
    finally:
        os.close(read)
    assert os.path.normpath(os.path.join("/job", name)) == f"/job/{name}"
    assert set(manifest.files) == {name}
