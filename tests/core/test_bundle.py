"""What leaves a peer is signed, and names only what the receiver can check."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from dht.core import codec
from dht.core.identity import BadSignature
from grid.core import limits
from grid.core.bundle import (
    COMPLETION_DOMAIN,
    DECLARATION_DOMAIN,
    GRANT_DOMAIN,
    Completion,
    Declaration,
    Grant,
    ResultRange,
    SegmentRef,
    Signed,
    StageOptions,
    check_declaration,
    check_grant,
    open_signed,
    sign,
)
from grid.core.deque import Work
from grid.core.errors import FencedError, RefusedError
from tests.core.material import LEADER, OTHER, THIEF

JOB = b"j" * 32
EPOCH = 3
DECLARATION = Declaration(JOB, EPOCH, 0, b"f" * 32, 100, "count", StageOptions(retries=2, tags=("gpu",)))


def refs(*cuts: tuple[int, int, int]) -> tuple[SegmentRef, ...]:
    return tuple(SegmentRef(stage, first, count, b"b" * 32, 10) for stage, first, count in cuts)


def grant(works: Any = ((0, 0, 10),), segments: Any = None, **changes: Any) -> Grant:
    made = Grant(JOB, EPOCH, THIEF.id, 1, works, refs((0, 0, 10)) if segments is None else segments)
    return msgspec.structs.replace(made, **changes)


def check(made: Grant) -> list[Work]:
    return check_grant(sign(made, GRANT_DOMAIN, OTHER), OTHER.id, THIEF.id, JOB, EPOCH)[1]


def test_signed_bytes_survive_the_wire() -> None:
    signed = codec.decode(codec.encode(sign(DECLARATION, DECLARATION_DOMAIN, LEADER)), Signed)
    assert open_signed(signed, DECLARATION_DOMAIN, Declaration) == (LEADER.id, DECLARATION)


def test_one_signature_serves_one_purpose() -> None:
    signed = sign(DECLARATION, DECLARATION_DOMAIN, LEADER)
    for domain in (GRANT_DOMAIN, COMPLETION_DOMAIN):
        with pytest.raises(BadSignature):
            open_signed(signed, domain, Declaration)


def test_any_changed_byte_is_noticed() -> None:
    signed = sign(DECLARATION, DECLARATION_DOMAIN, LEADER)
    for at in range(len(signed.payload)):
        payload = bytearray(signed.payload)
        payload[at] ^= 1
        with pytest.raises(BadSignature):
            open_signed(Signed(bytes(payload), signed.key, signed.signature), DECLARATION_DOMAIN, Declaration)
    with pytest.raises(BadSignature):
        open_signed(Signed(signed.payload, THIEF.public, signed.signature), DECLARATION_DOMAIN, Declaration)
    with pytest.raises(BadSignature):
        open_signed(Signed(signed.payload, b"short", signed.signature), DECLARATION_DOMAIN, Declaration)


def test_well_signed_nonsense() -> None:
    with pytest.raises(codec.CodecError):
        open_signed(sign(("x",), DECLARATION_DOMAIN, LEADER), DECLARATION_DOMAIN, Declaration)


def test_declaration_of_the_leader() -> None:
    signed = sign(DECLARATION, DECLARATION_DOMAIN, LEADER)
    assert check_declaration(signed, JOB, EPOCH, LEADER.id) == DECLARATION


def test_declaration_that_is_not_the_leaders() -> None:
    with pytest.raises(RefusedError, match="leader"):
        check_declaration(sign(DECLARATION, DECLARATION_DOMAIN, OTHER), JOB, EPOCH, LEADER.id)


def test_declaration_of_another_job_or_epoch() -> None:
    signed = sign(DECLARATION, DECLARATION_DOMAIN, LEADER)
    with pytest.raises(RefusedError, match="another job"):
        check_declaration(signed, b"k" * 32, EPOCH, LEADER.id)
    for epoch in (EPOCH - 1, EPOCH + 1):
        with pytest.raises(FencedError):
            check_declaration(signed, JOB, epoch, LEADER.id)


def test_function_over_its_bound() -> None:
    large = msgspec.structs.replace(DECLARATION, function_size=limits.FUNCTION_BYTES_MAX + 1)
    with pytest.raises(RefusedError, match="bound"):
        check_declaration(sign(large, DECLARATION_DOMAIN, LEADER), JOB, EPOCH, LEADER.id)


def test_grant_names_its_ranges() -> None:
    works = ((0, 2, 9), (1, 0, 30))
    assert check(grant(works, refs((1, 20, 10), (0, 0, 10), (1, 0, 20)))) == [Work(*work) for work in works]


def test_grant_from_another_peer_than_its_sender() -> None:
    signed = sign(grant(), GRANT_DOMAIN, OTHER)
    with pytest.raises(RefusedError):
        check_grant(signed, LEADER.id, THIEF.id, JOB, EPOCH)


def test_grant_meant_for_another_thief() -> None:
    with pytest.raises(RefusedError):
        check(grant(to=LEADER.id))


def test_grant_of_another_job_or_epoch() -> None:
    with pytest.raises(RefusedError, match="another job"):
        check(grant(job=b"k" * 32))
    with pytest.raises(FencedError):
        check(grant(epoch=EPOCH + 1))


@pytest.mark.parametrize(
    ("works", "segments"),
    [
        (((0, 0, 11),), refs((0, 0, 10))),
        (((0, 0, 10),), refs((0, 1, 9))),
        (((0, 0, 10),), refs((0, 0, 4), (0, 5, 5))),
        (((1, 0, 10),), refs((0, 0, 10))),
        (((0, 0, 10),), ()),
        (((0, 5, 5),), refs((0, 0, 10))),
        (((0, 6, 5),), refs((0, 0, 10))),
        (((0, -1, 5),), refs((0, 0, 10))),
        (((0, 0, 5), (0, 5, 12)), refs((0, 0, 10))),
    ],
)
def test_grant_of_tasks_without_their_arguments(works: Any, segments: Any) -> None:
    with pytest.raises(RefusedError, match="without their arguments"):
        check(grant(works, segments))


@pytest.mark.parametrize(("first", "count"), [(0, 0), (0, -4), (-1, 11), (0, limits.TASKS_MAX + 1)])
def test_grant_of_segments_that_can_not_be(first: int, count: int) -> None:
    with pytest.raises(RefusedError):
        check(grant(segments=refs((0, first, count))))


def test_completion_without_a_session_is_of_session_0() -> None:
    """As a peer of the first version sends it."""
    result = ResultRange(0, b"f" * 32, 0, 1, 0, b"x", b"", 1, 10)
    old = codec.encode((JOB, EPOCH, 1, (result,)))
    assert codec.decode(old, Completion) == Completion(JOB, EPOCH, 1, (result,), (), 0)
