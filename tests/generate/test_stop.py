"""Stop strings do not depend on how the text is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashinfer.generate import StopStrings

LETTERS = st.text("ab", max_size=12)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """By trying every end: the first at which some stop string is complete, the longest of those."""
    for end in range(len(text) + 1):
        complete = [s for s in stops if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(pieces=st.lists(LETTERS, max_size=6), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_against_trying_every_end(pieces: list[str], stops: list[str]) -> None:
    stop = StopStrings(stops)
    out = "".join([stop.push(p) for p in pieces]) + stop.flush()
    assert (out, stop.stopped) == expected("".join(pieces), stops)


@given(pieces=st.lists(LETTERS, max_size=6), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_only_a_possible_beginning_is_held_back(pieces: list[str], stops: list[str]) -> None:
    stop, out = StopStrings(stops), ""
    for n, piece in enumerate(pieces, 1):
        out += stop.push(piece)
        if stop.stopped:
            return
        held = "".join(pieces[:n])[len(out) :]
        assert not held or any(s.startswith(held) for s in stops)


def test_an_empty_stop_string_is_refused() -> None:
    for bad in ([""], "abc"):
        with pytest.raises(ValueError, match="stop"):
            StopStrings(bad)
