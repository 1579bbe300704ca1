"""The cores: codec, identity, membership, invites, records, tokens, trust."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dht.core.codec import CodecError, decode, encode
from dht.core.datagram import DATAGRAM_BYTES_MAX, ENVELOPE_BYTES, Kind, Packet, parse, seal
from dht.core.identity import BadSignature, Identity, peer_id, verify
from dht.core.invite import Grant, Invite, InviteError, check_grant, make_invite
from dht.core.membership import (
    ALL_ROLES,
    CHAIN_LENGTH_MAX,
    ROLES,
    Certificate,
    Membership,
    MembershipError,
    Role,
    issue,
    verify_chain,
)
from dht.core.messages import CERTIFICATES_MAX, Hello, Store
from dht.core.records import (
    LIFETIME_S_MAX,
    VALUE_BYTES_MAX,
    Record,
    RecordError,
    make_record,
    newest,
    supersedes,
    verify_record,
)
from dht.core.tokens import SLOT_S, Tokens
from dht.core.trust import Trust
from tests.dht.world import EPOCH_S, ROOT, founder, identity, member

NOW_S = EPOCH_S
GRID = ROOT.public
FOUNDER = founder()
MEMBER = member(FOUNDER, 1)
RECORD = make_record(GRID, MEMBER.identity, b"k" * 20, "test", 5, int(NOW_S) + 60, b"value")
INVITE, GRANT = make_invite(FOUNDER, ("10.0.0.1:4743", "lab:1"), ROLES["member"], b"", 1, NOW_S, 60, random.Random(4))
WORD = INVITE.encode()


# codec


@given(st.binary(max_size=300))
def test_decode_raises_codec_error_and_nothing_else(data: bytes) -> None:
    for type_ in (Certificate, Record, Grant, Packet, Hello, Store, tuple[int, ...]):
        try:
            value = decode(data, type_)
        except CodecError:
            continue
        assert decode(encode(value), type_) == value  # what does decode is a value of that type


@given(st.data())
def test_damaged_bytes_never_pass_for_another_valid_record(data: st.DataObject) -> None:
    good = encode(RECORD)
    i = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[i] ^= data.draw(st.integers(1, 255))
    try:
        record = decode(bytes(bad), Record)
    except CodecError:
        return
    if record == RECORD:  # a sloppy encoding of the same value, a number in a wider form: signatures don't cover it
        assert encode(record) == good
        return
    with pytest.raises(RecordError):
        verify_record(GRID, record, NOW_S)


def test_a_wider_form_of_a_number_is_the_same_value() -> None:
    good = encode(RECORD)
    at = good.index(b"\xce")  # a 32-bit number; 0xd2 begins a signed one
    assert decode(good[:at] + b"\xd2" + good[at + 1 :], Record) == RECORD


def test_one_value_has_one_encoding() -> None:
    assert encode({"b": 1, "a": 2}) == encode({"a": 2, "b": 1})
    assert encode(decode(encode(RECORD), Record)) == encode(RECORD)


def test_a_field_of_wrong_length_or_type_is_a_codec_error() -> None:
    for bad in (("short",), (1, 2, 3, 4, 5, 6, 7), (b"k" * 21, "x", 1, 1, b"", b"i" * 32, b"s" * 64)):
        with pytest.raises(CodecError):
            decode(encode(bad), Record)


def test_nesting_without_end_is_a_codec_error() -> None:
    with pytest.raises(CodecError):
        decode(b"\x91" * 100_000, list)


# identity


def test_a_signature_serves_one_domain_key_and_payload_only() -> None:
    key, other = identity(1), identity(2)
    signature = key.sign("grid/a/1", b"x")
    verify(key.public, "grid/a/1", b"x", signature)
    for public, domain, payload, signed in (
        (key.public, "grid/b/1", b"x", signature),
        (key.public, "grid/a/1", b"y", signature),
        (other.public, "grid/a/1", b"x", signature),
        (key.public, "grid/a/1", b"x", signature[:-1]),
        (key.public[:-1], "grid/a/1", b"x", signature),
        (bytes(32), "grid/a/1", b"x", signature),
    ):
        with pytest.raises(BadSignature):
            verify(public, domain, payload, signed)


def test_the_id_follows_from_the_key_and_the_seed_stays_out_of_reprs() -> None:
    key = identity(1)
    assert key.id == peer_id(key.public)
    assert len(key.id) == 20
    assert Identity.from_seed(key.seed).public == key.public
    assert key.seed.hex() not in repr(key)


# membership


def test_members_admit_members_down_a_chain() -> None:
    third = member(MEMBER, 2)
    assert len(third.chain) == 3
    leaf = FOUNDER.check(third.chain, NOW_S)
    assert leaf.key == third.identity.public
    assert third.owner == third.identity.id
    assert third.roles == ROLES["member"]


def test_a_chain_of_another_grid_is_refused() -> None:
    with pytest.raises(MembershipError, match="another grid"):
        verify_chain(identity(9).public, MEMBER.chain, NOW_S)


def test_a_chain_with_a_missing_or_swapped_link_is_refused() -> None:
    third = member(MEMBER, 2).chain
    for chain in ((), third[1:], (third[0], third[2]), (third[1], third[0], third[2])):
        with pytest.raises(MembershipError):
            verify_chain(GRID, chain, NOW_S)


def test_expired_and_revoked_certificates_break_the_chain() -> None:
    third = member(MEMBER, 2)
    with pytest.raises(MembershipError, match="expired"):
        verify_chain(GRID, third.chain, NOW_S + 400 * 86_400)
    FOUNDER_VIEW = founder()
    FOUNDER_VIEW.check(third.chain, NOW_S)  # verified and cached, yet revocation beats it
    FOUNDER_VIEW.revoke([MEMBER.identity.public])
    with pytest.raises(MembershipError, match="revoked"):
        FOUNDER_VIEW.check(third.chain, NOW_S)


def test_a_cached_chain_expires_too() -> None:
    view = founder()
    chain = FOUNDER.admit(identity(2).public, Role.WORK, b"", NOW_S, lifetime_s=10)
    view.check(chain, NOW_S)
    with pytest.raises(MembershipError, match="expired"):
        view.check(chain, NOW_S + 10)


def test_a_worker_can_not_admit() -> None:
    worker = member(FOUNDER, 2, Role.WORK)
    with pytest.raises(MembershipError, match="may not invite"):
        worker.admit(identity(3).public, Role.WORK, b"", NOW_S)
    forged = issue(GRID, worker.identity, identity(3).public, Role.WORK, identity(3).id, int(NOW_S) + 60)
    with pytest.raises(MembershipError, match="may not invite"):
        verify_chain(GRID, (*worker.chain, forged), NOW_S)


@given(held=st.integers(1, 15), given_roles=st.integers(0, 31))
def test_roles_attenuate(held: int, given_roles: int) -> None:
    issuer = Membership(GRID, identity(2), FOUNDER.admit(identity(2).public, Role(held), b"", NOW_S))
    key = identity(3)
    certificate = issue(GRID, issuer.identity, key.public, Role(given_roles), key.id, int(NOW_S) + 60)
    legal = bool(held & Role.INVITE) and 0 < given_roles <= ALL_ROLES
    legal = legal and (bool(held & Role.ADMIN) or not given_roles & ~held)
    chain = (*issuer.chain, certificate)
    if legal:
        assert verify_chain(GRID, chain, NOW_S).roles == given_roles
        assert issuer.admit(key.public, Role(given_roles), b"", NOW_S)
    else:
        with pytest.raises(MembershipError):
            verify_chain(GRID, chain, NOW_S)
        with pytest.raises(MembershipError):
            issuer.admit(key.public, Role(given_roles), b"", NOW_S)


def test_nobody_makes_others_a_machine_of_a_person_it_is_not() -> None:
    victim = identity(7).id
    with pytest.raises(MembershipError, match="owner"):
        MEMBER.admit(identity(3).public, Role.WORK, victim, NOW_S)
    forged = issue(GRID, MEMBER.identity, identity(3).public, Role.WORK, victim, int(NOW_S) + 60)
    with pytest.raises(MembershipError, match="owner"):
        verify_chain(GRID, (*MEMBER.chain, forged), NOW_S)
    assert MEMBER.admit(identity(3).public, Role.WORK, MEMBER.owner, NOW_S)[-1].owner == MEMBER.owner
    assert FOUNDER.admit(identity(3).public, Role.WORK, victim, NOW_S)[-1].owner == victim  # an admin may


def test_chains_have_a_longest_length() -> None:
    last = FOUNDER
    for number in range(1, CHAIN_LENGTH_MAX):
        last = member(last, number)
    assert FOUNDER.check(last.chain, NOW_S)
    with pytest.raises(MembershipError, match="too many invitations"):
        member(last, 99)
    extra = issue(GRID, last.identity, identity(99).public, Role.WORK, identity(99).id, int(NOW_S) + 60)
    with pytest.raises(MembershipError, match="over 32"):
        verify_chain(GRID, (*last.chain, extra), NOW_S)


@given(st.data())
def test_a_changed_certificate_is_never_accepted(data: st.DataObject) -> None:
    good = encode(MEMBER.chain[-1])
    i = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[i] ^= data.draw(st.integers(1, 255))
    with pytest.raises((CodecError, MembershipError)):
        verify_chain(GRID, (MEMBER.chain[0], decode(bytes(bad), Certificate)), NOW_S)


def test_trust_takes_certificates_root_first_and_checks_on_every_use() -> None:
    third, view = member(MEMBER, 2), founder()
    trust = Trust(view)
    with pytest.raises(MembershipError, match="missing"):
        trust.learn(third.chain[2:], NOW_S)
    assert trust.member(third.identity.public, NOW_S) is None
    trust.learn(third.chain[:2], NOW_S)
    trust.learn(third.chain[2:], NOW_S)
    assert trust.chain(third.identity.public, NOW_S) == third.chain
    assert trust.member(third.identity.public, NOW_S + 400 * 86_400) is None
    trust.learn(third.chain, NOW_S)
    view.revoke([MEMBER.identity.public])
    assert trust.member(third.identity.public, NOW_S) is None


def test_trust_is_bounded() -> None:
    trust = Trust(founder(), keys_max=3)
    for number in range(1, 10):
        trust.learn(member(FOUNDER, number).chain, NOW_S)
    assert len(trust) == 3
    assert trust.member(identity(9).public, NOW_S) is not None
    assert trust.member(identity(1).public, NOW_S) is None


# invites


def test_an_invite_survives_being_pasted() -> None:
    assert Invite.decode(WORD) == INVITE
    assert Invite.decode(f"  {WORD[:40]}\n{WORD[40:].upper()} \n") == INVITE
    assert " " not in WORD
    assert INVITE.key.public == GRANT.key


@settings(max_examples=300)
@given(st.data())
def test_a_changed_invite_is_never_accepted(data: st.DataObject) -> None:
    i = data.draw(st.integers(0, len(WORD) - 1))
    letter = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz0123456789-_"))
    change = data.draw(st.sampled_from(["replace", "insert", "delete", "swap", "cut"]))
    changed = {
        "replace": WORD[:i] + letter + WORD[i + 1 :],
        "insert": WORD[:i] + letter + WORD[i:],
        "delete": WORD[:i] + WORD[i + 1 :],
        "swap": WORD[:i] + WORD[i + 1 : i + 2] + WORD[i : i + 1] + WORD[i + 2 :],
        "cut": WORD[:i],
    }[change]
    if changed != WORD:
        with pytest.raises(InviteError):
            Invite.decode(changed)


@given(st.text(max_size=200) | st.text("grid1234567abcdef", max_size=200).map(lambda t: "grid1" + t))
def test_any_text_is_an_invite_error(text: str) -> None:
    with pytest.raises(InviteError):
        Invite.decode(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (WORD[:-1], "cut short"),
        (WORD[:60], "cut short"),
        (WORD[:5], "cut short"),
        ("", "not an invite"),
        ("hello", "not an invite"),
        (WORD + "aaaaaaaa", "not an invite"),
        (WORD[:50] + ("b" if WORD[50] != "b" else "c") + WORD[51:], "wrong character"),
        ("grid2" + WORD[5:], "version 2"),
        ("x" * 100_000, "not an invite"),
    ],
)
def test_each_damage_has_its_message(text: str, says: str) -> None:
    with pytest.raises(InviteError, match=says) as error:
        Invite.decode(text)
    assert "\n" not in str(error.value)


def test_an_expired_invite_says_so() -> None:
    INVITE.check(NOW_S)
    with pytest.raises(InviteError, match="expired"):
        INVITE.check(NOW_S + 61)


def test_a_grant_is_checked_against_its_inviter() -> None:
    check_grant(GRID, GRANT, NOW_S)
    with pytest.raises(MembershipError, match="expired"):
        check_grant(GRID, GRANT, NOW_S + 61)
    with pytest.raises(MembershipError, match="revoked"):
        check_grant(GRID, GRANT, NOW_S, {FOUNDER.identity.public})
    with pytest.raises(MembershipError, match="another grid"):
        check_grant(identity(9).public, GRANT, NOW_S)


@given(st.data())
def test_a_changed_grant_is_never_accepted(data: st.DataObject) -> None:
    good = encode(GRANT)
    i = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[i] ^= data.draw(st.integers(1, 255))
    with pytest.raises((CodecError, MembershipError)):
        check_grant(GRID, decode(bytes(bad), Grant), NOW_S)


def test_nobody_invites_beyond_its_own_roles_or_owner() -> None:
    worker = member(FOUNDER, 2, Role.WORK)
    for inviter, roles, owner in ((worker, Role.WORK, b""), (MEMBER, ALL_ROLES, b""), (MEMBER, Role.WORK, b"o" * 20)):
        with pytest.raises(MembershipError):
            make_invite(inviter, (), roles, owner, 1, NOW_S, 60, random.Random(1))
    _, grant = make_invite(MEMBER, (), Role.WORK, MEMBER.owner, 1, NOW_S, 60, random.Random(1))
    check_grant(GRID, grant, NOW_S)


# records


def test_records_expire_and_can_not_be_made_younger() -> None:
    verify_record(GRID, RECORD, NOW_S)
    with pytest.raises(RecordError, match="expired"):
        verify_record(GRID, RECORD, NOW_S + 60)
    younger = Record(
        *(getattr(RECORD, f) for f in RECORD.__struct_fields__[:3]),
        RECORD.expires_s + 60,
        *(getattr(RECORD, f) for f in RECORD.__struct_fields__[4:]),
    )
    with pytest.raises(RecordError, match="forged"):
        verify_record(GRID, younger, NOW_S)
    with pytest.raises(RecordError, match="forged"):
        verify_record(identity(9).public, RECORD, NOW_S)
    eternal = make_record(GRID, MEMBER.identity, b"k" * 20, "test", 5, int(NOW_S) + LIFETIME_S_MAX + 60, b"")
    with pytest.raises(RecordError, match="too long"):
        verify_record(GRID, eternal, NOW_S)


def test_the_largest_record_fits_one_datagram() -> None:
    record = make_record(GRID, MEMBER.identity, b"k" * 20, "k" * 16, 1 << 62, 1 << 40, bytes(VALUE_BYTES_MAX))
    assert len(encode(Store(record))) + ENVELOPE_BYTES <= DATAGRAM_BYTES_MAX
    with pytest.raises(RecordError):
        make_record(GRID, MEMBER.identity, b"k" * 20, "k", 1, 1, bytes(VALUE_BYTES_MAX + 1))


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("ab"), st.integers(0, 3), st.binary(max_size=1))))
def test_every_peer_picks_the_same_newest_records(entries: list[tuple[int, str, int, bytes]]) -> None:
    records = [make_record(GRID, identity(i), b"k" * 20, kind, seq, 9, value) for i, kind, seq, value in entries]
    best = newest(records)
    assert newest(records[::-1]) == best == newest([*records, *best])
    assert len({r.slot for r in best}) == len(best) == len({r.slot for r in records})
    for record in records:
        winner = next(b for b in best if b.slot == record.slot)
        assert not supersedes(record, winner)


# datagrams and tokens


def test_the_largest_hello_fits_one_datagram() -> None:
    last = FOUNDER
    for number in range(1, CERTIFICATES_MAX):
        last = member(last, number)
    hello = Hello(last.chain, last.identity.public, 1 << 16)
    assert len(last.chain) == CERTIFICATES_MAX
    assert len(encode(hello)) + ENVELOPE_BYTES <= DATAGRAM_BYTES_MAX


def test_answers_a_stranger_can_get_are_not_longer_than_any_request() -> None:
    def size(kind: Kind) -> int:
        return len(seal(GRID, FOUNDER.identity, Packet(int(kind), bytes(8), bytes(20), bytes(8), b"")))

    shortest = min(size(kind) for kind in Kind if kind < Kind.ANSWER)
    assert max(size(Kind.RETRY), size(Kind.WHO)) <= shortest


@given(st.binary(max_size=1_500))
def test_no_bytes_break_parse(data: bytes) -> None:
    with pytest.raises(CodecError):
        parse(data)


def test_a_token_serves_one_key_one_address_and_two_slots() -> None:
    tokens, other = Tokens(random.Random(1)), Tokens(random.Random(2))
    here, there = ("10.0.0.1", 1), ("10.0.0.2", 1)
    token = tokens.give(b"a" * 32, here, 10.0)
    assert tokens.check(token, b"a" * 32, here, 10.0 + SLOT_S)
    assert not tokens.check(token, b"a" * 32, here, 10.0 + 2 * SLOT_S)
    assert not tokens.check(token, b"a" * 32, there, 10.0)
    assert not tokens.check(token, b"b" * 32, here, 10.0)
    assert not other.check(token, b"a" * 32, here, 10.0)
