"""Ranges change hands between a leader and its helpers, with real signatures: nothing is lost, nothing held for ever."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from blake3 import blake3

from dht.core import codec
from dht.core.identity import BadSignature, PeerId
from grid import giving
from grid.api import wire
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
    TaskFailure,
    open_signed,
    sign,
)
from grid.core.deque import RangeDeque, Work
from grid.core.errors import FencedError, RefusedError
from grid.core.messages import (
    Accepted,
    Claims,
    Completed,
    Drop,
    Give,
    GrantTaken,
    Message,
    Nothing,
    Poke,
    Printed,
    Relay,
    RelayClosed,
    Steal,
)
from grid.siteworker import SiteWorker
from tests.core.fakes import DIGEST, FUNCTION, JOB, FakeChild, result_bytes, segment_bytes, settle
from tests.core.material import LEADER, OTHER, THIEF
from tests.core.team import Helper, Team

Make = Callable[..., Team]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    async with trio.open_nursery() as nursery:

        def team(helpers: int = 1, **options: Any) -> Team:
            made = Team(nursery, tmp_path, helpers)
            made.open(**options)
            return made

        yield team
        nursery.cancel_scope.cancel()


def tasks(works: list[Work]) -> list[int]:
    return [index for work in works for index in range(work.lo, work.hi)]


def opened(give: Message) -> Grant:
    assert isinstance(give, Give)
    return open_signed(give.grant, GRANT_DOMAIN, Grant)[1]


def report(helper: Helper, lo: int, hi: int, body: bytes | None = None, stage: int = 0) -> None:
    """As if a worker had finished these."""
    helper.site.deque.remove(stage, lo, hi)
    helper.remote.result(stage, lo, hi, result_bytes(lo, hi) if body is None else body, 10)


async def send_batch(helper: Helper) -> Completed:
    batch, ranges = await helper.remote.reports.next()
    helper.remote._release_segments(ranges)
    helper.post.post(LEADER.id, batch)
    return batch


# ---- the victim ------------------------------------------------------------------------------------------------------


async def test_thief_gets_about_half_from_the_tail_with_all_it_needs(make: Make) -> None:
    team = make()
    team.page(*[10] * 10)
    thief = team.helpers[0]
    answer = await team.steal(thief)
    grant = opened(answer)
    assert grant.works == ((0, 50, 100),)
    assert team.site.deque.ranges() == [Work(0, 0, 50)]
    assert thief.site.deque.ranges() == [Work(0, 50, 100)]
    assert isinstance(answer, Give)
    assert len(answer.declarations) == 1
    assert answer.functions == ((DIGEST, FUNCTION),)
    assert [ref.first for ref in grant.segments] == list(range(50, 100, 10))
    assert all(answer.inline)
    assert thief.site.stages[0].held[50].ready


async def test_new_work_is_shared_evenly_among_all_who_look_for_some(make: Make) -> None:
    """Halves would leave next to nothing to the last, who would have to look for it elsewhere at once."""
    team = make(helpers=3)
    for thief in team.helpers:
        assert isinstance(await team.steal(thief), Nothing)
    team.page(*[1] * 80)
    for thief in team.helpers:
        await team.steal(thief)
    assert [site.deque.total for site in (team.site, *(each.site for each in team.helpers))] == [20, 20, 20, 20]
    await team.deliver()
    await team.steal(team.helpers[0])
    assert team.site.deque.total == 10, "nobody else looks for work any more"


async def test_of_little_work_a_thief_gets_a_task_a_slot_but_no_more_than_half(make: Make) -> None:
    team = make(helpers=3)
    for thief in team.helpers:
        assert isinstance(await team.steal(thief), Nothing)
    team.page(*[1] * 10)
    for thief in team.helpers:
        await team.steal(thief, slots=4)
    assert [site.deque.total for site in (team.site, *(each.site for each in team.helpers))] == [1, 4, 3, 2]


async def test_declarations_and_functions_are_sent_once(make: Make) -> None:
    team = make()
    team.page(10, 10, 10, 10)
    await team.steal(team.helpers[0])
    again = await team.steal(team.helpers[0])
    assert isinstance(again, Give)
    assert again.declarations == ()
    assert again.functions == ()


async def test_victim_holds_what_it_gives_until_the_thief_has_it(make: Make) -> None:
    team = make()
    team.page(10)
    thief = team.helpers[0]
    await team.steal(thief)
    assert tasks(team.outreach.giver.held()) == list(range(5, 10))
    await team.deliver()
    assert team.outreach.giver.held() == []
    assert team.outreach.giver.given_tasks == 5
    assert team.leader.tallies[thief.id].stolen == 5


async def test_only_the_thief_can_say_that_it_has_it(make: Make) -> None:
    team = make(helpers=2)
    team.page(10)
    await team.steal(team.helpers[0])
    team.helpers[0].post.sent.clear()
    await team.outreach.handle(team.helpers[1].id, GrantTaken(JOB, 1))
    assert team.outreach.giver.held()


async def test_grant_that_nobody_acknowledges_comes_back_to_the_head(make: Make) -> None:
    team = make()
    team.page(5, 5)
    give = await team.outreach.giver.give(THIEF.id, Steal(JOB, 1, 1))
    assert give is not None
    team.outreach.giver.expire(trio.current_time() + limits.STEAL_TIMEOUT_S - 0.1)
    assert team.site.deque.total == 5
    team.outreach.giver.expire(trio.current_time() + limits.STEAL_TIMEOUT_S + 0.1)
    assert next(iter(team.site.deque)) == Work(0, 5, 10)
    assert team.outreach.giver.taken(THIEF.id, 1) == []
    assert team.site.deque.total == 10


async def test_grant_that_comes_back_to_a_full_deque(make: Make) -> None:
    team = make()
    team.page(5, 5)
    give = await team.outreach.giver.give(THIEF.id, Steal(JOB, 1, 1))
    assert give is not None
    team.site.deque = RangeDeque(1)
    team.site.deque.push_tail(Work(0, 0, 1))
    team.outreach.giver.expire(1e9)
    assert team.outreach.giver.held() == []
    assert team.leader.sweep(0.0) == []
    assert tasks(team.leader.sweep(0.5)) == list(range(1, 10)), "it is nobody's and runs again"


async def test_thief_without_the_tag_gets_nothing_of_that_stage(make: Make) -> None:
    team = make(tags=("gpu",))
    team.page(10)
    assert isinstance(await team.steal(team.helpers[0]), Nothing)
    team.helpers[0].remote.tags = ("gpu", "fast")
    assert isinstance(await team.steal(team.helpers[0]), Give)


async def test_long_segments_are_blobs(make: Make) -> None:
    team = make()
    team.page(4, 4, filler=limits.SEGMENT_INLINE_BYTES)
    thief = team.helpers[0]
    answer = await team.steal(thief)
    assert isinstance(answer, Give)
    assert answer.inline == (b"",)
    (ref,) = opened(answer).segments
    assert team.blobs[ref.blob].startswith(segment_bytes(4, 8))
    assert not thief.site.stages[0].held[4].ready


async def test_long_functions_are_blobs(make: Make) -> None:
    code = b"x" * (limits.SEGMENT_INLINE_BYTES + 1)
    team = make(function=code)
    team.page(4)
    answer = await team.steal(team.helpers[0])
    assert isinstance(answer, Give)
    assert answer.functions == ()
    assert team.helpers[0].site.functions[0] is not None


async def test_grant_stays_under_a_frame(make: Make) -> None:
    team = make()
    team.page(*[1] * 60, filler=60_000)
    answer = await team.steal(team.helpers[0])
    assert isinstance(answer, Give)
    assert len(codec.encode(answer)) < 1 << 20
    assert sum(map(len, answer.inline)) <= limits.GRANT_BYTES_MAX
    assert sorted(tasks([*team.site.deque.ranges(), *team.outreach.giver.held()])) == list(range(60))
    first = team.outreach.giver.held()[0]
    assert list(team.site.deque) == [Work(0, 0, first.lo), Work(0, first.hi, 60)], "what was too much went back to the tail"


async def test_functions_count_against_the_frame_too(make: Make) -> None:
    team = make()
    for stage in range(1, 40):
        team.open(stage, function=bytes([stage]) * 60_000)
        team.page(1, stage=stage)
    answer = await team.steal(team.helpers[0])
    assert isinstance(answer, Give)
    assert len(codec.encode(answer)) < 1 << 20
    assert sum(work.size for work in team.site.deque) + opened(answer).works.__len__() == 39


async def test_segments_of_a_grant_are_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(giving, "SEGMENTS_MAX", 3)
    team = make()
    team.page(*[1] * 20)
    assert len(opened(await team.steal(team.helpers[0])).segments) == 3


async def test_segment_of_two_ranges_is_sent_once(make: Make) -> None:
    team = make()
    team.page(20)
    team.site.drop(0, 15, 17)
    grant = opened(await team.steal(team.helpers[0]))
    assert len(grant.works) > 1
    assert len(grant.segments) == 1


async def test_cancel_while_a_grant_is_packed(make: Make) -> None:
    team = make()
    team.page(4, 4, 4, 4, filler=limits.SEGMENT_INLINE_BYTES)
    found: list[Any] = []

    async def ask() -> None:
        found.append(await team.outreach.steal(THIEF.id, Steal(JOB, 1, 1)))

    team.data.gate = trio.Event()
    team.nursery.start_soon(ask)
    await settle()
    team.leader.cancel(0, 12, 16)
    team.data.gate.set()
    await settle()
    assert opened(found[0]).works == ((0, 8, 12),)
    assert tasks(team.outreach.giver.held()) == [8, 9, 10, 11]


async def test_cancel_of_all_that_is_packed(make: Make) -> None:
    team = make()
    team.page(4, 4, filler=limits.SEGMENT_INLINE_BYTES)
    found: list[Any] = []

    async def ask() -> None:
        found.append(await team.outreach.steal(THIEF.id, Steal(JOB, 1, 1)))

    team.data.gate = trio.Event()
    team.nursery.start_soon(ask)
    await settle()
    team.leader.cancel(0, 0, -1)
    team.data.gate.set()
    await settle()
    assert isinstance(found[0], Nothing)
    assert team.outreach.giver.held() == []


async def test_empty_victim_parks_the_thief_and_names_others(make: Make) -> None:
    team = make(helpers=2)
    team.page(10)
    first, second = team.helpers
    while not isinstance(await team.steal(first), Nothing):
        await team.deliver()
    answer = await team.steal(second)
    assert isinstance(answer, Nothing)
    assert answer.hints == (first.id,)
    assert answer.parked
    team.page(10)
    team.outreach.poke()
    assert {peer for peer, message in team.post.sent if isinstance(message, Poke)} == {first.id, second.id}
    team.post.sent.clear()
    team.outreach.poke()
    assert team.post.sent == []


async def test_thieves_of_a_leader_without_work_are_told_to_ask_less_often_the_more_they_are(make: Make) -> None:
    team = make()
    pauses = []
    for number in range(4 * limits.THIEVES_PER_S_MAX):
        answer = await team.outreach.steal(PeerId(number.to_bytes(20, "big")), Steal(JOB, 1, 1))
        assert isinstance(answer, Nothing)
        pauses.append(answer.pause_ms)
    assert pauses[0] <= 1000 * limits.STEAL_BACKOFF_S_MAX
    assert pauses == sorted(pauses)
    assert pauses[-1] == 4000


async def test_thief_of_another_epoch_is_fenced(make: Make) -> None:
    team = make()
    team.page(10)
    with pytest.raises(FencedError):
        await team.outreach.steal(THIEF.id, Steal(JOB, 2, 1))
    assert team.site.deque.total == 10


async def test_thief_that_claims_to_know_everything(make: Make) -> None:
    """The ranges are a stranger's numbers: they must cost neither time nor memory."""
    team = make()
    team.page(10)
    known = tuple((0, 1 << 60) for _ in range(10_000))
    answer = await team.outreach.steal(THIEF.id, Steal(JOB, 1, 1, (), known))
    assert isinstance(answer, Give)
    assert answer.declarations == ()


async def test_thief_is_robbed_in_turn(make: Make) -> None:
    team = make(helpers=2)
    team.page(10, 10)
    first, second = team.helpers
    await team.steal(first)
    await team.deliver()
    await team.steal(second, first)
    held = [site.deque.ranges() for site in (team.site, first.site, second.site)]
    assert held == [[Work(0, 0, 10)], [Work(0, 10, 15)], [Work(0, 15, 20)]]
    claims = second.post.take(Claims)
    assert [claim.held for claim in claims] == [((0, ((15, 20),)),)], "claimed before the giver stops to"
    await team.deliver()
    assert list(first.remote.held()[0]) == [(10, 15)]


async def test_ranges_that_come_back_before_the_word_that_they_had_arrived(make: Make) -> None:
    """Their way was shorter than the word's: they are here then, whatever that says later."""
    team = make(helpers=3)
    team.page(10, 10)
    first, second, third = team.helpers
    await team.steal(first)
    await team.deliver()
    await team.steal(second, first)
    await team.steal(third, second)
    await team.steal(first, third)
    back = first.site.deque.ranges()
    await team.deliver()
    assert first.site.deque.ranges() == back
    everywhere = [work for site in (team.site, *(each.site for each in team.helpers)) for work in site.deque.ranges()]
    assert sorted(tasks(everywhere)) == list(range(20))
    assert [each.remote.giver.held() for each in team.helpers] == [[], [], []]


# ---- the thief -------------------------------------------------------------------------------------------------------


async def given(team: Team) -> Give:
    team.page(10)
    answer = await team.outreach.steal(THIEF.id, team.helpers[0].remote.ask(1))
    assert isinstance(answer, Give)
    return answer


def regranted(give: Give, **changes: Any) -> Give:
    grant = msgspec.structs.replace(open_signed(give.grant, GRANT_DOMAIN, Grant)[1], **changes)
    return msgspec.structs.replace(give, grant=sign(grant, GRANT_DOMAIN, LEADER))


async def refuses(team: Team, give: Give, giver: PeerId = LEADER.id) -> None:
    thief = team.helpers[0]
    with pytest.raises((RefusedError, BadSignature, codec.CodecError)):
        await thief.remote.take(giver, give)
    assert not thief.site.held()
    assert all(not stage.held for stage in thief.site.stages.values())
    assert thief.post.take(GrantTaken) == []


async def test_grant_in_anothers_name(make: Make) -> None:
    team = make()
    await refuses(team, await given(team), OTHER.id)


async def test_grant_whose_arguments_were_exchanged(make: Make) -> None:
    team = make()
    give = await given(team)
    await refuses(team, msgspec.structs.replace(give, inline=(b"other",)))
    await refuses(team, msgspec.structs.replace(give, inline=()))


async def test_function_that_was_exchanged(make: Make) -> None:
    """It would run here in the job's name."""
    team = make()
    give = await given(team)
    await refuses(team, msgspec.structs.replace(give, functions=((DIGEST, b"evil"),)))
    await team.helpers[0].remote.take(LEADER.id, give)
    assert team.helpers[0].site.functions == [FUNCTION]


async def test_declaration_of_another_member(make: Make) -> None:
    team = make()
    give = await given(team)
    declaration = Declaration(JOB, 1, 0, blake3(b"evil").digest(), 4, "f", StageOptions())
    forged = sign(declaration, DECLARATION_DOMAIN, OTHER)
    await refuses(team, msgspec.structs.replace(give, declarations=(forged,), functions=((declaration.function, b"evil"),)))


async def test_grant_of_a_stage_that_was_never_declared(make: Make) -> None:
    team = make()
    give = await given(team)
    await refuses(team, msgspec.structs.replace(give, declarations=()))


async def test_grant_that_cuts_segments_otherwise(make: Make) -> None:
    team = make()
    give = await given(team)
    await team.helpers[0].remote.take(LEADER.id, give)
    before = team.helpers[0].remote.held()
    other = SegmentRef(0, 5, 10, b"b" * 32, 10)
    with pytest.raises(RefusedError):
        await team.helpers[0].remote.take(
            LEADER.id, msgspec.structs.replace(regranted(give, segments=(other,), works=((0, 5, 15),)), inline=(b"",))
        )
    assert team.helpers[0].remote.held() == before


async def test_function_that_can_not_be_fetched_is_sent_again(make: Make) -> None:
    """Else its tasks would be held here for ever, never run, always claimed."""
    team = make(function=b"x" * (limits.SEGMENT_INLINE_BYTES + 1))
    give = await given(team)
    thief = team.helpers[0]
    thief.data.lost = True
    with pytest.raises(OSError, match="no peer"):
        await thief.remote.take(LEADER.id, give)
    assert not thief.remote.held()
    assert thief.remote.ask(1).known_stages == ()
    thief.data.lost = False
    await thief.remote.take(LEADER.id, give)
    assert thief.site.functions[0] is not None
    assert thief.remote.ask(1).known_stages == ((0, 1),)


async def test_thief_with_a_full_deque_claims_only_what_it_holds(make: Make) -> None:
    team = make()
    give = await given(team)
    thief = team.helpers[0]
    thief.site.deque = RangeDeque(1)
    thief.site.deque.push_tail(Work(7, 0, 1))
    thief.site.add_stage(7, StageOptions(), 0)
    await thief.remote.take(LEADER.id, give)
    assert 0 not in thief.remote.held()


async def test_messages_that_only_the_leader_may_send(make: Make) -> None:
    team = make()
    for message in (Accepted(JOB, 1), Drop(JOB, 1, ()), Relay(JOB, 1, b""), RelayClosed(JOB, 1)):
        with pytest.raises(RefusedError):
            await team.helpers[0].remote.handle(OTHER.id, message)
    with pytest.raises(RefusedError):
        await team.helpers[0].remote.handle(LEADER.id, Poke(JOB))


# ---- completions -----------------------------------------------------------------------------------------------------


async def stolen(team: Team) -> Helper:
    """Tasks [5, 10) are the first helper's."""
    team.page(5, 5)
    await team.steal(team.helpers[0])
    await team.deliver()
    return team.helpers[0]


async def test_result_goes_home_and_is_held_until_it_is_acknowledged(make: Make) -> None:
    team = make(ordered=False)
    thief = await stolen(team)
    report(thief, 5, 7)
    report(thief, 7, 10)
    assert list(thief.remote.held()[0]) == [(5, 10)]
    await send_batch(thief)
    assert list(thief.remote.held()[0]) == [(5, 10)], "not acknowledged yet"
    assert thief.site.stages[0].held == {}, "but its arguments are not needed any more"
    await team.deliver()
    assert not thief.remote.held()
    assert not thief.remote.reports._sent
    assert team.driver.values() == {index: index * 10 for index in range(5, 10)}
    assert team.leader.tallies[thief.id].done == 5


async def test_resent_batch_is_acknowledged_and_not_counted_twice(make: Make) -> None:
    team = make(ordered=False)
    thief = await stolen(team)
    report(thief, 5, 10)
    await send_batch(thief)
    team.post.sent.clear()
    for peer, message in list(thief.post.sent):
        assert peer == LEADER.id
        await team.outreach.handle(thief.id, message)
    team.post.sent.clear()  # its acknowledgement is lost with the connection
    thief.post.sent.clear()
    thief.remote.reconnected()
    await team.deliver()
    assert not thief.remote.reports._sent
    assert team.leader.tallies[thief.id].executed == 5


async def test_batch_that_was_lost_is_sent_again_after_a_while(make: Make, autojump_clock: trio.testing.MockClock) -> None:
    """The connection stood all the time: a full queue was dropped."""
    team = make(ordered=False)
    thief = await stolen(team)
    report(thief, 5, 7)
    await send_batch(thief)
    thief.post.sent.clear()
    report(thief, 7, 10)
    await send_batch(thief)
    await team.deliver()
    assert thief.remote.reports._sent
    thief.remote._tidy()
    assert thief.post.take(Completed) == []
    await trio.sleep(limits.RESEND_S + 0.1)
    thief.remote._tidy()
    await team.deliver()
    assert not thief.remote.reports._sent
    assert len(team.driver.values()) == 5


async def test_peer_that_was_restarted_counts_its_batches_anew(make: Make, tmp_path: Path) -> None:
    """Its new batches are no repetitions of the old ones with the same numbers."""
    team = make(ordered=False)
    thief = await stolen(team)
    report(thief, 5, 6)
    await send_batch(thief)
    await team.deliver()
    late = Accepted(JOB, 1, thief.remote.reports._session)
    await trio.sleep(0.001)
    again = Helper(team, THIEF, tmp_path / "again", 0)
    team.helpers[0] = again
    await team.steal(again)
    await team.deliver()
    lo, hi = again.site.deque.ranges()[0][1:]
    report(again, lo, hi)
    await send_batch(again)
    await again.remote.handle(LEADER.id, late)
    assert again.remote.reports._sent, "the old session's acknowledgement says nothing of the new one"
    await team.deliver()
    assert not again.remote.reports._sent
    assert set(team.driver.values()) == {5, *range(lo, hi)}


async def test_large_result_is_fetched_and_acknowledged_then(make: Make) -> None:
    team = make(ordered=False)
    thief = await stolen(team)
    report(thief, 5, 10, result_bytes(5, 10) + b" " * limits.RESULT_INLINE_BYTES)
    await send_batch(thief)
    await team.deliver()
    assert thief.remote.reports._sent
    await settle()
    await team.deliver()
    assert not thief.remote.reports._sent
    assert len(team.driver.values()) == 5
    assert thief.data.store.unpinned
    assert team.data.store.unpinned


async def test_large_result_that_can_not_be_fetched_runs_again(make: Make) -> None:
    team = make(ordered=False)
    thief = await stolen(team)
    team.site.deque.remove(0, 0, 5)
    report(thief, 5, 10, result_bytes(5, 10) + b" " * limits.RESULT_INLINE_BYTES)
    await send_batch(thief)
    team.data.lost = True
    await team.deliver()
    await settle()
    await team.deliver()
    thief.remote._claim()
    await team.deliver()
    assert "could not be fetched" not in team.outreach.reasons.get(thief.id, "")
    now_s = trio.current_time()
    team.leader.sweep(now_s)
    assert tasks(team.leader.sweep(now_s + 0.5)) == list(range(10))


async def test_bad_result_in_a_batch_does_not_stop_the_others(make: Make) -> None:
    """Its batch must be acknowledged, or the peer's later ones never are."""
    team = make(ordered=False)
    thief = await stolen(team)
    good = ResultRange(0, DIGEST, 5, 10, 5, result_bytes(5, 10), b"", 1, 1)
    results = [
        msgspec.structs.replace(good, stage=99),
        msgspec.structs.replace(good, function=b"g" * 32),
        msgspec.structs.replace(good, first=6),
        msgspec.structs.replace(good, hi=99),
        msgspec.structs.replace(good, lo=7, hi=7),
        msgspec.structs.replace(good, stage=99, blob=b"b" * 32),
        good,
    ]
    failures = [TaskFailure(9, DIGEST, 0, "raised", "", "", "", b"", 1), TaskFailure(0, DIGEST, 77, "raised", "", "", "", b"", 1)]
    completion = Completion(JOB, 1, 1, tuple(results), tuple(failures), 5)
    await team.outreach.handle(thief.id, Completed(sign(completion, COMPLETION_DOMAIN, THIEF)))
    await settle()
    assert len(team.driver.values()) == 5
    assert team.post.take(Accepted)[-1] == Accepted(JOB, 1, 5)


async def test_completion_in_anothers_name(make: Make) -> None:
    team = make(ordered=False)
    await stolen(team)
    result = ResultRange(0, DIGEST, 5, 10, 5, result_bytes(5, 10), b"", 1, 1)
    signed = sign(Completion(JOB, 1, 1, (result,)), COMPLETION_DOMAIN, THIEF)
    for peer, wrong in (
        (OTHER.id, signed),
        (THIEF.id, sign(Completion(b"k" * 32, 1, 1, (result,)), COMPLETION_DOMAIN, THIEF)),
        (THIEF.id, Signed(signed.payload, OTHER.public, signed.signature)),
    ):
        with pytest.raises((RefusedError, BadSignature)):
            await team.outreach.handle(peer, Completed(wrong))
    assert team.driver.got == []


async def test_failures_travel_with_bounded_texts(make: Make) -> None:
    team = make()
    thief = await stolen(team)
    thief.site.deque.remove(0, 5, 10)
    for index in range(5, 10):
        text = "\u20ac" * 200_000
        thief.remote.failure(0, wire.Failed(1, index, "raised", "E", text, text, 1, False), b"x" * limits.RESULT_INLINE_BYTES)
    batches = 0
    while thief.remote.reports._failures:
        assert len(codec.encode(await send_batch(thief))) < 1 << 20
        batches += 1
    assert batches > 1
    await team.deliver()
    assert team.leader.ledger.stage(0).failed == 5
    assert not thief.remote.held()


async def test_one_batch_stays_under_a_frame(make: Make) -> None:
    team = make(ordered=False)
    team.page(*[1] * 40)
    thief = team.helpers[0]
    await team.steal(thief)
    await team.deliver()
    for index in range(20, 40):
        report(thief, index, index + 1, result_bytes(index, index + 1) + b" " * 60_000)
    while thief.remote.reports._results:
        assert len(codec.encode(await send_batch(thief))) < 1 << 20
    await team.deliver()
    assert len(team.driver.values()) == 20


async def test_prints_are_limited_and_what_is_lost_is_counted(make: Make) -> None:
    team = make()
    thief = team.helpers[0]
    budget = int(limits.PRINT_BYTES_PER_S * limits.HEARTBEAT_S)
    for _ in range(10):
        thief.remote.printed(wire.Print(0, 1, 1), b"x" * (budget // 4))
        thief.remote._send_prints()  # as with each batch of completions
    printed = thief.post.take(Printed)
    assert sum(len(line[3]) for message in printed for line in message.lines) <= budget
    assert sum(message.dropped_bytes for message in printed) == 6 * (budget // 4)


# ---- claims, drops, losses -------------------------------------------------------------------------------------------


async def test_stale_heartbeat_does_not_take_a_grant_away(make: Make) -> None:
    """It was sent before the grant arrived, and came after it was given."""
    team = make()
    team.page(5, 5)
    thief = team.helpers[0]
    thief.remote._claim()
    stale = thief.post.take(Claims)[0]
    await team.steal(thief)
    await team.outreach.handle(thief.id, stale)
    await team.deliver()
    team.site.deque.remove(0, 0, 5)
    team.leader.complete(LEADER.id, 0, DIGEST, 0, 5, 0, b"[]")
    now_s = trio.current_time()
    assert [team.leader.sweep(now_s + n * limits.HEARTBEAT_S) for n in range(3)] == [[], [], []]


async def test_claims_of_nonsense_change_nothing(make: Make) -> None:
    team = make()
    thief = await stolen(team)
    for wrong in ((5, 3), (-1, 2)):
        with pytest.raises(RefusedError):
            await team.outreach.handle(thief.id, Claims(JOB, 1, ((0, (wrong,)),), 1, 0))
    assert list(team.leader.claims.held(thief.id, 0)) == [(5, 10)]


async def test_cancel_reaches_those_who_hold_the_tasks(make: Make, autojump_clock: trio.testing.MockClock) -> None:
    team = make()
    thief = await stolen(team)
    team.nursery.start_soon(team.outreach.run)
    team.producer.handle(wire.Cancel(0, 6, 8), b"")
    await trio.sleep(limits.HEARTBEAT_S * 1.5)
    await team.deliver()
    assert list(thief.remote.held()[0]) == [(5, 6), (8, 10)]
    team.producer.handle(wire.Cancel(0, 0, -1), b"")
    await trio.sleep(limits.HEARTBEAT_S)
    await team.deliver()
    assert not thief.remote.held()
    assert thief.site.stages[0].held == {}, "nor their arguments"


async def test_cancel_of_very_many_single_tasks_fits_into_messages(make: Make) -> None:
    team = make()
    team.page(40_000)
    thief = team.helpers[0]
    await team.steal(thief)
    await team.deliver()
    for index in range(20_000, 40_000, 2):
        team.leader.cancel(0, index, index + 1)
    team.outreach._drop()
    drops = team.post.take(Drop)
    assert len(drops) > 1
    assert all(len(codec.encode(drop)) < 1 << 18 for drop in drops)
    for drop in drops:
        await thief.remote.handle(LEADER.id, drop)
    assert thief.site.deque.total == 10_000


async def test_segments_given_on_are_let_go(make: Make) -> None:
    team = make(helpers=2)
    team.page(5, 5, 5, 5)
    first, second = team.helpers
    await team.steal(first)
    await team.deliver()
    await team.steal(second, first)
    assert sorted(first.site.stages[0].held) == [10, 15], "until the other has them"
    await team.deliver()
    assert sorted(first.site.stages[0].held) == [10]


async def test_segment_under_way_to_a_thief_is_kept(make: Make) -> None:
    """A grant takes its second half; its first half ends here meanwhile."""
    team = make(helpers=2)
    team.page(10, 10)
    first, second = team.helpers
    await team.steal(first)
    await team.deliver()
    await team.steal(second, first)
    report(first, 10, 15)
    await send_batch(first)
    assert sorted(first.site.stages[0].held) == [10]
    first.remote.giver.expire(1e9)
    assert list(first.site.held()[0]) == [(15, 20)]


async def test_children_of_a_lost_peers_tasks_are_ended_at_both_ends(make: Make) -> None:
    team = make()
    thief = await stolen(team)
    child = FakeChild()
    worker = SiteWorker(child, 3)  # type: ignore[arg-type]
    worker.nests = True
    thief.site.workers.append(worker)
    for frame, body in ((wire.Define(0, "g"), FUNCTION), (wire.Stage(0, 0, "g", True, parent_stage=0, parent_index=5), b"")):
        header = wire.encode(frame)[wire.PREFIX.size :]
        await team.outreach.handle(thief.id, Relay(JOB, 3, header, body))
    assert len(team.leader.ledger.stages) == 2
    team.outreach.lost(thief.id)
    assert team.leader.ledger.stage(1).complete
    await team.deliver()
    assert child.why == "dropped", "the connection may have broken for the leader only"


async def test_child_that_breaks_the_protocol_at_another_peer_is_ended(make: Make) -> None:
    team = make()
    thief = await stolen(team)
    child = FakeChild()
    worker = SiteWorker(child, 3)  # type: ignore[arg-type]
    worker.nests = True
    thief.site.workers.append(worker)
    header = wire.encode(wire.Cancel(7))[wire.PREFIX.size :]
    await team.outreach.handle(thief.id, Relay(JOB, 3, header))
    await team.deliver()
    assert child.why == "stage 7 was never opened"
    assert team.leader._children == {}


async def test_frames_for_a_child_reach_it(make: Make) -> None:
    team = make()
    thief = await stolen(team)
    child = FakeChild()
    thief.site.workers.append(SiteWorker(child, 3))  # type: ignore[arg-type]
    header = wire.encode(wire.Cancelled(0, 1, 2))[wire.PREFIX.size :]
    await thief.remote.handle(LEADER.id, Relay(JOB, 3, header))
    await thief.remote.handle(LEADER.id, Relay(JOB, 4, header))
    assert [message for message, _ in child.posted] == [wire.Cancelled(0, 1, 2)]
    with pytest.raises(RefusedError):
        await thief.remote.handle(LEADER.id, Relay(JOB, 3, b"\xc1"))


async def test_lost_leader_ends_workers_that_wait_for_it(make: Make) -> None:
    team = make()
    thief = await stolen(team)
    children = [FakeChild(), FakeChild()]
    for token, child in enumerate(children):
        worker = SiteWorker(child, token)  # type: ignore[arg-type]
        worker.nests = token == 1
        thief.site.workers.append(worker)
    thief.remote.disconnected()
    assert [child.why for child in children] == ["", "dropped"]


async def test_stages_known_are_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DECLARATIONS_KEPT_MAX", 3)
    team = make()
    thief = team.helpers[0]
    for stage in range(1, 8):
        team.open(stage)
        team.page(1, stage=stage)
        await team.steal(thief)
        await team.deliver()
        report(thief, 0, 1, stage=stage)
        await send_batch(thief)
        await team.deliver()
        assert len(thief.remote._declarations) <= 3


async def test_peer_that_holds_a_blob_is_remembered(make: Make) -> None:
    team = make(helpers=2)
    for helper in team.helpers:
        helper.data.fetched = [b"b" * 32]
        helper.remote._claim()
    await team.deliver()
    assert team.outreach.holders(b"b" * 32) == [helper.id for helper in team.helpers]
    assert team.outreach.holders(b"c" * 32) == []
    assert team.helpers[0].data.fetched == []
