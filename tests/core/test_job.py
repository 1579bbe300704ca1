"""Specs, states."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from dht.core import codec
from dht.core.identity import BadSignature, peer_id
from dht.core.membership import Certificate, Chain, Membership, MembershipError, Role, issue
from grid.core.errors import IllegalTransitionError, RefusedError
from grid.core.job import (
    CANCELLED,
    FAILED,
    FINAL,
    FINISHED,
    PENDING,
    RUNNING,
    JobSpec,
    SignedSpec,
    first_leader,
    job_id,
    open_spec,
    sign_spec,
    transition,
)
from tests.core.material import LEADER, MEMBERSHIP, NOW_S, OTHER, ROOT, THIEF, signed_spec, spec

LEGAL = {
    (PENDING, RUNNING),
    (PENDING, FAILED),
    (PENDING, CANCELLED),
    (RUNNING, FINISHED),
    (RUNNING, FAILED),
    (RUNNING, CANCELLED),
}


def check(chain: Chain) -> Certificate:
    return MEMBERSHIP.check(chain, NOW_S)


@pytest.mark.parametrize(("state", "to"), list(itertools.product([PENDING, RUNNING, FINISHED, FAILED, CANCELLED], repeat=2)))
def test_every_transition(state: str, to: str) -> None:
    if (state, to) in LEGAL:
        assert transition(state, to) == to
    else:
        with pytest.raises(IllegalTransitionError):
            transition(state, to)


def test_final_states_lead_nowhere() -> None:
    assert {state for state, _ in LEGAL}.isdisjoint(FINAL)


def test_resent_spec_is_the_same_job_and_two_submits_are_two() -> None:
    assert job_id(signed_spec().payload) == job_id(signed_spec().payload)
    assert job_id(signed_spec(b"1").payload) != job_id(signed_spec(b"2").payload)


def test_spec_survives_the_wire() -> None:
    sent = codec.decode(codec.encode(signed_spec()), SignedSpec)
    job, opened = open_spec(sent, check, ROOT.public)
    assert opened == spec()
    assert job == job_id(signed_spec().payload)
    assert first_leader(opened) == peer_id(LEADER.public)


def test_spec_of_another_grid() -> None:
    with pytest.raises(RefusedError, match="another grid"):
        open_spec(signed_spec(), check, OTHER.public)


def test_spec_that_was_changed_after_it_was_signed() -> None:
    signed = signed_spec()
    changed = codec.encode(msgspec.structs.replace(spec(), argv=("rm", "-rf")))
    with pytest.raises(BadSignature):
        open_spec(SignedSpec(changed, signed.signature, signed.chain), check, ROOT.public)


def test_spec_signed_by_another_member_in_the_submitters_name() -> None:
    payload = codec.encode(spec())
    forged = SignedSpec(payload, THIEF.sign("grid/job/1", payload), MEMBERSHIP.chain)
    with pytest.raises(BadSignature):
        open_spec(forged, check, ROOT.public)


def test_spec_with_the_chain_of_another_member() -> None:
    chain = MEMBERSHIP.admit(THIEF.public, Role.SUBMIT, THIEF.id, NOW_S)
    with pytest.raises(RefusedError, match="its submitter"):
        open_spec(SignedSpec(signed_spec().payload, signed_spec().signature, chain), check, ROOT.public)


def test_signature_made_for_something_else() -> None:
    payload = codec.encode(spec())
    with pytest.raises(BadSignature):
        open_spec(SignedSpec(payload, LEADER.sign("grid/bundle/1", payload), MEMBERSHIP.chain), check, ROOT.public)


def test_submitter_that_is_no_member() -> None:
    stranger = Membership(
        OTHER.public, OTHER, (issue(OTHER.public, OTHER, OTHER.public, Role.SUBMIT, OTHER.id, int(NOW_S) + 99),)
    )
    signed = sign_spec(spec(submitter=OTHER), OTHER, stranger.chain)
    with pytest.raises(MembershipError):
        open_spec(signed, check, ROOT.public)


def test_worker_may_not_submit() -> None:
    chain = MEMBERSHIP.admit(THIEF.public, Role.WORK, THIEF.id, NOW_S)
    with pytest.raises(RefusedError, match="may not submit"):
        open_spec(sign_spec(spec(submitter=THIEF), THIEF, chain), check, ROOT.public)


def test_job_in_another_persons_name() -> None:
    """Whose job it is decides who may cancel it and where it is trusted."""
    chain = MEMBERSHIP.admit(THIEF.public, Role.SUBMIT, THIEF.id, NOW_S)
    boast = msgspec.structs.replace(spec(submitter=THIEF), owner=LEADER.id)
    with pytest.raises(RefusedError, match="owner"):
        open_spec(sign_spec(boast, THIEF, chain), check, ROOT.public)


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x90", codec.encode(spec())[:-3], codec.encode(("x",) * 17)])
def test_payload_that_is_no_spec(payload: bytes) -> None:
    with pytest.raises(codec.CodecError):
        open_spec(SignedSpec(payload, bytes(64), MEMBERSHIP.chain), check, ROOT.public)


def test_spec_without_what_was_added_later_is_read_with_its_defaults() -> None:
    short = codec.encode(list(codec.decode(codec.encode(spec()), tuple))[:11])
    assert codec.decode(short, JobSpec) == spec()
