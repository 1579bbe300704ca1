"""The framing alone: every cut, every flip, every order in which sectors may arrive."""

from __future__ import annotations

import itertools

import pytest

from grid.core.journal_frames import FRAME_BYTES_MAX, HEAD_BYTES, SECTOR_BYTES, Ending, Frame, FrameWriter, JournalReader

E = ord("E")


def frames(*sizes: int, fill: int = 7) -> list[Frame]:
    return [Frame(E, bytes([fill + n % 5]) * size) for n, size in enumerate(sizes)]


BATCHES = [frames(30), frames(5, 0, 40), frames(1), frames(600, 20), frames(9, 9)]


def written(batches: list[list[Frame]]) -> list[bytes]:
    writer = FrameWriter()
    return [writer.encode(batch) for batch in batches]


def joined(batches: list[list[Frame]]) -> list[Frame]:
    return list(itertools.chain.from_iterable(batches))


def read(data: bytes, synced_bytes: int = 0, step: int = 1 << 20) -> tuple[list[Frame], Ending]:
    reader = JournalReader()
    found: list[Frame] = []
    for start in range(0, len(data), step):
        found += reader.feed(data[start : start + step])
    return found, reader.finish(synced_bytes)


def whole(parts: list[bytes], length: int) -> int:
    """How many batches the first `length` bytes hold."""
    return sum(end <= length for end in itertools.accumulate(map(len, parts)))


@pytest.mark.parametrize("step", [1, 7, 100, 1 << 20])
def test_what_was_written_is_read(step: int) -> None:
    data = b"".join(written(BATCHES))
    assert read(data, len(data), step) == (joined(BATCHES), Ending("clean", len(data)))


@pytest.mark.parametrize("rest", ["end of file", "zeroes"])
def test_every_cut_leaves_exactly_the_whole_batches(rest: str) -> None:
    parts = written(BATCHES)
    data = b"".join(parts)
    for length in range(len(data) + 1):
        torn = data[:length] + (bytes(len(data) - length) if rest == "zeroes" else b"")
        count = whole(parts, length)
        found, ending = read(torn)
        assert found == joined(BATCHES[:count])
        good = sum(map(len, parts[:count]))
        assert ending.good_bytes == good
        if count == 0:
            assert ending.verdict == "damaged"
        else:
            assert ending.verdict == ("clean" if len(torn) == good else "torn")


def test_a_cut_of_synced_bytes_is_damage() -> None:
    parts = written(BATCHES)
    data = b"".join(parts)
    ends = list(itertools.accumulate(map(len, parts)))
    for synced in ends:
        for length in range(len(data)):
            verdict = read(data[:length], synced)[1].verdict
            assert (verdict == "damaged") == (length < max(synced, ends[0]))


def test_every_flip_is_damage_even_in_the_last_batch() -> None:
    for count in range(1, len(BATCHES) + 1):
        data = b"".join(written(BATCHES[:count]))
        for bit in range(len(data) * 8):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            found, ending = read(bytes(flipped))
            assert ending.verdict == "damaged"
            assert found == joined(BATCHES)[: len(found)]


@pytest.mark.parametrize("start", [0, 1, 300, SECTOR_BYTES - HEAD_BYTES - 24, SECTOR_BYTES - 40, SECTOR_BYTES - 41])
def test_every_set_of_sectors_that_arrived_is_a_torn_tail(start: int) -> None:
    before, last = frames(start), frames(700, 3, 900, 40)
    first, second = written([before, last])
    edges = [len(first), *range((len(first) // SECTOR_BYTES + 1) * SECTOR_BYTES, len(first + second), SECTOR_BYTES)]
    pieces = [(first + second)[a:b] for a, b in itertools.pairwise([*edges, len(first + second)])]
    for arrived in itertools.product((True, False), repeat=len(pieces)):
        data = first + b"".join(piece if there else bytes(len(piece)) for piece, there in zip(pieces, arrived, strict=True))
        found, ending = read(data)
        assert ending.verdict == ("clean" if all(arrived) else "torn"), arrived
        assert found == (before + last if all(arrived) else before)


@pytest.mark.parametrize("hole", [1, 2, 3])
def test_zeroes_where_a_later_batch_follows_are_damage(hole: int) -> None:
    parts = written(BATCHES)
    parts[hole] = bytes(len(parts[hole]))
    found, ending = read(b"".join(parts))
    assert ending == Ending("damaged", sum(map(len, parts[:hole])), ending.why)
    assert found == joined(BATCHES[:hole])


def test_removed_swapped_repeated_and_replaced_batches_are_damage() -> None:
    a, b, c, d, e = written(BATCHES)
    other = written([BATCHES[0], frames(5, 0, 40, fill=8), *BATCHES[2:]])
    for parts in ([a, c, d, e], [a, c, b, d, e], [a, b, b, c, d, e], [a, b, c, d, e, b], [a, other[1], c, d, e], [b, c], [e]):
        assert read(b"".join(parts))[1].verdict == "damaged"


def test_a_batch_of_another_file_is_damage() -> None:
    a, b, *_ = written(BATCHES)
    other, c, *_ = written([frames(31), *BATCHES[1:]])
    for parts in ([a, c], [a, b, other], [a, b, c]):
        assert read(b"".join(parts))[1].verdict == "damaged"


def test_a_payload_that_looks_like_a_later_batch_is_no_proof_of_one() -> None:
    """A user's bytes must not turn a torn tail into damage."""
    forged = b"".join(written(BATCHES))
    first, second = written([frames(8), [Frame(E, bytes([1]) * SECTOR_BYTES * 2 + forged)]])
    cut = (len(first) // SECTOR_BYTES + 1) * SECTOR_BYTES
    data = (first + second)[:cut] + bytes(SECTOR_BYTES) + (first + second)[cut + SECTOR_BYTES :]
    assert read(data)[1] == Ending("torn", len(first), "the last write was cut short")


def test_a_batch_may_be_encoded_in_pieces() -> None:
    pieces = FrameWriter()
    data = pieces.encode(frames(3, 4), more=True) + pieces.encode(frames(5)) + pieces.encode(frames(6))
    assert read(data)[0] == frames(3, 4) + frames(5) + frames(6)
    once = FrameWriter()
    one, same = frames(3)[0], frames(3)[0]
    assert read(once.encode([one, same, one]))[0] == [one, same, one]


def test_too_long_a_payload_is_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        FrameWriter().encode([Frame(E, bytes(FRAME_BYTES_MAX + 1))])


def test_nothing_and_rubbish_are_damage() -> None:
    for data in (b"", b"\0" * 5000, b"rubbish" * 100):
        assert read(data)[1].verdict == "damaged"
