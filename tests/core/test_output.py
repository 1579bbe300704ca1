"""What a replay writes again is not shown again; what was shown never changes."""

from hypothesis import given
from hypothesis import strategies as st

from grid.core.output import Replayed


def replay(shown: bytes, written: list[bytes], known: bytes | None = None) -> tuple[bytes, bool]:
    """All that is shown in the end, and whether the replay differed."""
    here = shown if known is None else known
    stream = Replayed(len(shown), lambda at, size: here[at : at + size])
    new = b"".join(stream.feed(part) for part in written)
    stream.end()
    return shown + new, stream.differs


def test_same_output_goes_on_where_it_was() -> None:
    assert replay(b"one\ntw", [b"on", b"e\nt", b"wo\nthree\n"]) == (b"one\ntwo\nthree\n", False)


def test_nothing_was_shown_before() -> None:
    assert replay(b"", [b"a", b"b\n"]) == (b"ab\n", False)


def test_replay_ends_where_the_shown_part_ended() -> None:
    assert replay(b"one\n", [b"one\n"]) == (b"one\n", False)


def test_other_output_goes_on_at_the_next_line() -> None:
    assert replay(b"at 12:00\nx", [b"at 13:37\nyz\nend\n"]) == (b"at 12:00\nx\nend\n", True)


def test_other_output_that_ends_with_its_line_goes_on_at_once() -> None:
    assert replay(b"at 12:00\n", [b"at 13:37\n", b"end\n"]) == (b"at 12:00\nend\n", True)


def test_longer_other_line_is_left_out_to_its_end() -> None:
    assert replay(b"9\n", [b"10\n11\n"]) == (b"9\n11\n", True)


def test_shorter_output_differs_and_changes_nothing() -> None:
    assert replay(b"one\ntwo\n", [b"one\n"]) == (b"one\ntwo\n", True)


def test_bytes_that_are_missing_here_are_not_compared() -> None:
    assert replay(b"one\ntwo\n", [b"one\nTWO\nthree\n"], known=b"one\n") == (b"one\ntwo\nthree\n", False)


@given(st.binary(max_size=60), st.lists(st.binary(max_size=12), max_size=12))
def test_what_was_shown_never_changes(shown: bytes, parts: list[bytes]) -> None:
    result, differs = replay(shown, parts)
    written = b"".join(parts)
    assert result.startswith(shown)
    assert differs == (not written.startswith(shown))
    if not differs:
        assert result == written


@given(st.lists(st.sampled_from([b"a", b"b\n", b"\n", b"cc"]), max_size=20), st.integers(0, 40), st.integers(1, 7))
def test_how_the_bytes_arrive_does_not_matter(parts: list[bytes], length: int, step: int) -> None:
    written = b"".join(parts)
    shown = b"x" * min(length, len(written))
    steps = [written[at : at + step] for at in range(0, len(written), step)]
    assert replay(shown, steps) == replay(shown, [written])
