"""`emitted`: a pure function of two short lists."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.speculative.verify import emitted

TOKENS = st.integers(0, 2)
"""Few, so that drafts are often right."""


@st.composite
def drafts(draw):
    draft = draw(st.lists(TOKENS, max_size=6))
    drawn = draw(st.lists(TOKENS | st.sampled_from([-1, -2]), min_size=len(draft) + 1, max_size=9))
    return draft, drawn


@given(drafts())
def test_what_is_emitted(given):
    draft, drawn = given
    tokens = emitted(draft, drawn)
    num_accepted = len(tokens) - 1
    assert 0 <= num_accepted <= len(draft)
    assert tokens == drawn[: len(tokens)]  # never a drafted token that was not drawn
    assert tokens[:num_accepted] == draft[:num_accepted]
    if num_accepted < len(draft):
        assert tokens[-1] != draft[num_accepted]


@given(drafts())
def test_the_arguments_stay_as_they_are_and_tuples_are_fine(given):
    draft, drawn = given
    before = list(draft), list(drawn)
    assert emitted(tuple(draft), tuple(drawn)) == emitted(draft, drawn)
    assert (draft, drawn) == before


@given(st.lists(TOKENS, max_size=20), st.data())
def test_as_plain_decoding_whatever_is_drafted(text, data):
    """A draw is a function of the prefix: verified drafts give the text of one draw at a time."""

    def draw(prefix: list[int]) -> int:
        return (3 * sum(prefix) + 2 * len(prefix) + 1) % 5

    plain = list(text)
    for _ in range(12):
        plain.append(draw(plain))
    got = list(text)
    while len(got) < len(plain):
        draft = data.draw(st.lists(st.integers(0, 4), max_size=4))
        if data.draw(st.booleans()):  # and now and then a good one
            draft = [plain[i] for i in range(len(got), min(len(got) + 4, len(plain)))]
        got += emitted(draft, [draw(got + draft[:i]) for i in range(len(draft) + 1)])
    assert got[: len(plain)] == plain


@pytest.mark.parametrize(
    ("draft", "drawn", "want"),
    [
        ([], [7], [7]),
        ([7], [7, 8], [7, 8]),
        ([7], [9, 8], [9]),
        ([7, 8, 9], [7, 8, 9, 1], [7, 8, 9, 1]),
        ([7, 8, 9], [7, 1, 9, 1], [7, 1]),
        ([7, 7], [7, -1, 3], [7, -1]),
        ([7, 7], [-2, 7, 7], [-2]),
        ([7], [7, 8, 99], [7, 8]),
    ],
)
def test_examples(draft, drawn, want):
    assert emitted(draft, drawn) == want
