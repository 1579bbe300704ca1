"""The one codec of messages between peers."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht.core.codec import CodecError
from grid.core import messages
from grid.core.bundle import Signed
from grid.core.mandate import Branch, Endorsement, Mandate
from grid.core.messages import (
    Accepted,
    Answer,
    AnyMessage,
    Ask,
    Beat,
    Claims,
    Completed,
    Dismissed,
    Drop,
    Endorse,
    Endorsed,
    Enlist,
    Enlisted,
    FindBlob,
    Give,
    GrantTaken,
    Have,
    Holders,
    JobsWanted,
    Keep,
    Mail,
    Message,
    Nothing,
    Poke,
    Printed,
    Relay,
    RelayClosed,
    Renew,
    Renewed,
    Steal,
    Survey,
    Surveyed,
    decode,
    encode,
)
from tests.core.material import news, signed_spec

J = b"j" * 32
SIGNED = Signed(b"payload", b"k" * 32, b"s" * 64)
BRANCH = Branch(b"branch", (b"", b"older"), 2, 7)
EXAMPLES: list[Message] = [
    news(),
    JobsWanted(),
    Steal(J, 1, 4, ("gpu",), ((0, 3),), (b"h",)),
    Give(SIGNED, (SIGNED,), ((b"f", b"code"),), (b"", b"x"), ((b"b", (b"p",)),)),
    Nothing((b"p",), True, "running", 2, 500),
    GrantTaken(J, 7),
    Poke(J),
    Claims(J, 1, ((0, ((0, 5), (7, 9))),), 4, 2, (b"b",), "no tag"),
    Completed(SIGNED),
    Accepted(J, 5, 99),
    Drop(J, 1, ((0, ((0, 5),)),)),
    Printed(J, ((0, 1, 2, b"text"),), 3),
    Have(J, (b"b",)),
    Relay(J, 1, b"header", b"body", b"blob", 9),
    RelayClosed(J, 1, "why"),
    Ask("show", b"{}"),
    Answer(b"{}", b"body"),
    Renew(),
    Renewed(b"chain"),
    FindBlob(J, b"b"),
    Holders((b"p",)),
    Enlist(signed_spec(), BRANCH, ((b"b", 9),)),
    Enlisted(3),
    Mail(J, b"branch", 1, 2, b"data"),
    Dismissed(J, b"branch", 3),
    Survey(J, b"branch"),
    Surveyed(3, 4, 4, 99, True, True),
    Endorse(J, b"branch", 4),
    Endorsed(Endorsement(b"k" * 32, b"s" * 64)),
    Keep(J, ((b"b", 9),), (b"p",)),
    Beat(J, 1_000),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_every_message_survives_the_wire(message: Message) -> None:
    assert decode(encode(message)) == message


def test_no_kind_is_without_an_example() -> None:
    assert {type(message) for message in EXAMPLES} == set(get_args(AnyMessage))


def test_news_of_a_later_leader_carries_its_mandate() -> None:
    mandate = Mandate((b"a", b"b", b"c"), (Endorsement(b"k" * 32, b"s" * 64),))
    told = msgspec.structs.replace(news(epoch=4), branch=BRANCH, mandate=mandate)
    assert decode(encode(told)) == told


def test_tags_are_unique() -> None:
    tags = [kind.__struct_config__.tag for kind in get_args(AnyMessage)]
    assert len(tags) == len(set(tags))


def test_fields_added_later_have_defaults() -> None:
    """A message of the first version, without them, is still read."""
    for message, known in ((Accepted(J, 5), 2), (RelayClosed(J, 1), 2), (news(), 8)):
        raw = msgspec.msgpack.decode(encode(message))
        assert decode(msgspec.msgpack.encode(raw[: 1 + known])) == message


def test_fields_of_a_later_version_are_ignored() -> None:
    raw = msgspec.msgpack.decode(encode(Poke(J)))
    assert decode(msgspec.msgpack.encode([*raw, "new", 5])) == Poke(J)


@pytest.mark.parametrize("raw", [[], [999], [10, J], ["x", J], {"a": 1}, None, [14, "no bytes"], [11, [], [], [], []]])
def test_what_is_no_message(raw: Any) -> None:
    with pytest.raises(CodecError):
        decode(msgspec.msgpack.encode(raw))


@given(st.binary(max_size=200))
def test_garbage_raises_nothing_but_codec_error(data: bytes) -> None:
    with pytest.raises(CodecError):
        decode(b"\xc1" + data)
    try:
        decode(data)
    except CodecError:
        return


@given(st.sampled_from(EXAMPLES), st.data())
def test_damaged_message_raises_nothing_but_codec_error(message: Message, data: st.DataObject) -> None:
    raw = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        again = decode(bytes(raw))
    except CodecError:
        return
    assert isinstance(again, messages.Message)
