"""Prompt lookup against the plain definition: search the whole text, no index."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.request import Request, Row, Sequence
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.speculative import ngram
from jaxinfer.speculative.ngram import NgramProposer

PLACES = ngram._PLACES


def sequence_of(tokens: list[int]) -> Sequence:
    request = Request("r", list(tokens), SamplingParams(), 10_000)
    return Sequence(request, 0, list(tokens))


def row_of(sequence: Sequence, max_draft: int) -> Row:
    start = len(sequence.tokens) - 1
    return Row(sequence, start, 1, True, 0, [1], max_draft=max_draft)


def propose(proposer: NgramProposer, sequence: Sequence, count: int) -> list[int]:
    (draft,) = proposer.propose([row_of(sequence, count)])
    return draft


def found(tokens: list[int], shortest: int, longest: int) -> int | None:
    """Where the continuation begins: the longest match, the newest of equals, among the newest
    places where the last `shortest` tokens stand."""
    length = len(tokens)
    if length < shortest:
        return None
    tail = tokens[length - shortest :]
    ends = [e for e in range(shortest, length) if tokens[e - shortest : e] == tail]
    best, place = 0, None
    for end in ends[-PLACES:]:
        match = 0
        while match < min(longest, end) and tokens[end - 1 - match] == tokens[-1 - match]:
            match += 1
        if match >= best:
            best, place = match, end
    return place


def continued(tokens: list[int], start: int, count: int) -> list[int]:
    """`count` tokens after the text, each a copy of the one a period before it."""
    text = list(tokens)
    period = len(tokens) - start
    for _ in range(count):
        text.append(text[-period])
    return text[len(tokens) :]


def reference(tokens: list[int], shortest: int, longest: int, count: int) -> list[int]:
    start = found(tokens, shortest, longest)
    return [] if start is None or not count else continued(tokens, start, count)


BOUNDS = st.tuples(st.integers(1, 5), st.integers(1, 9)).map(sorted)


@settings(deadline=None, max_examples=300)
@given(
    bounds=BOUNDS,
    alphabet=st.integers(1, 4),
    pieces=st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=8),
    counts=st.lists(st.integers(0, 9), min_size=8, max_size=8),
)
def test_as_a_search_of_the_whole_text(bounds, alphabet, pieces, counts):
    """The text grows piece by piece, by nothing too, and is asked about after each."""
    shortest, longest = bounds
    proposer = NgramProposer(shortest, longest)
    sequence = sequence_of([0])
    for piece, count in zip(pieces, counts, strict=False):
        sequence.tokens += [token % alphabet for token in piece]
        want = reference(sequence.tokens, shortest, longest, count)
        is_found = found(sequence.tokens, shortest, longest) is not None
        assert proposer.available(sequence, 7) == (7 if is_found else 0)
        assert propose(proposer, sequence, count) == want
        assert propose(proposer, sequence, count) == want  # asking changes nothing


@settings(deadline=None, max_examples=100)
@given(
    bounds=BOUNDS,
    text=st.lists(st.integers(0, 2), min_size=1, max_size=60),
    cuts=st.sets(st.integers(1, 60)),
)
def test_when_it_is_asked_does_not_matter(bounds, text, cuts):
    shortest, longest = bounds
    often, once = NgramProposer(shortest, longest), NgramProposer(shortest, longest)
    sequence = sequence_of(text[:1])
    for cut in sorted(cuts | {len(text)}):
        sequence.tokens = text[:cut]
        often.available(sequence, 3)
    assert propose(often, sequence, 5) == propose(once, sequence_of(sequence.tokens), 5)


@pytest.mark.parametrize(
    ("text", "shortest", "longest", "want"),
    [
        ([1, 2, 3, 9, 8, 1, 2, 3], 3, 8, [9, 8, 1, 2]),
        ([1, 2, 3, 9, 8, 2, 3], 3, 8, []),  # only two tokens stand there again
        ([1, 2, 3, 9, 8, 2, 3], 2, 8, [9, 8, 2, 3]),
        ([5, 1, 2, 7, 6, 1, 2, 8, 6, 1, 2], 2, 8, [8, 6, 1, 2]),  # 3 tokens match, newest
        ([6, 1, 2, 7, 5, 1, 2, 8, 6, 1, 2], 2, 8, [7, 5, 1, 2]),  # the longer, though older
        ([6, 1, 2, 7, 5, 1, 2, 8, 6, 1, 2], 2, 2, [8, 6, 1, 2]),  # compared up to 2: the newer
        ([4, 4, 4, 4], 3, 8, [4, 4, 4, 4]),  # a period of one
        ([0, 1, 0, 1, 0, 1], 3, 8, [0, 1, 0, 1]),  # and of two
        ([1, 2], 3, 8, []),
        ([1, 2, 3], 3, 8, []),  # the end of the text is not a place before it
        ([7], 1, 1, []),
    ],
)
def test_examples(text, shortest, longest, want):
    assert propose(NgramProposer(shortest, longest), sequence_of(text), 4) == want
    assert reference(text, shortest, longest, 4) == want


def test_only_the_newest_places_are_compared():
    """The longest match of all is older than that many places, and is not looked at."""
    old = [9, 9, 9, 1, 2]
    text = [*old, 5, *[t for _ in range(PLACES) for t in (1, 2, 6)], *old]
    assert propose(NgramProposer(2, 8), sequence_of(text), 1) == [6]
    one_less = [*old, 5, *[t for _ in range(PLACES - 1) for t in (1, 2, 6)], *old]
    assert propose(NgramProposer(2, 8), sequence_of(one_less), 1) == [5]


def test_a_row_that_may_not_draft_gets_nothing_and_sequences_are_apart():
    proposer = NgramProposer(2, 4)
    same, other = sequence_of([1, 2, 3, 1, 2]), sequence_of([1, 2, 7, 1, 2])
    rows = [row_of(same, 0), row_of(other, 2), row_of(same, 1), row_of(sequence_of([5, 6]), 3)]
    assert proposer.propose(rows) == [[], [7, 1], [3], []]


def test_what_ended_is_forgotten():
    proposer = NgramProposer(2, 4)
    sequence = sequence_of([1, 2, 3, 1, 2])
    assert proposer.available(sequence, 3) == 3
    proposer.forget(sequence)
    proposer.forget(sequence)  # also of what is not known
    assert not proposer._indexes
    assert propose(proposer, sequence, 2) == [3, 1]


def test_the_cost_of_a_look_up_does_not_grow_with_the_text():
    """One n-gram everywhere is the worst case: every place matches. Counted, not timed, but for a
    bound that a search of the whole text would miss by far."""
    compared = []

    class Counting(NgramProposer):
        def _match(self, tokens, end):
            compared.append(end)
            return super()._match(tokens, end)

    proposer = Counting(3, 64)
    # A break in each hundred tokens keeps the longest match below `longest`: no early stop.
    text = [int(i % 50 != 0) for i in range(20_000)]
    sequence = sequence_of(text[:10])
    started = time.process_time()
    most = 0
    for end in range(10, len(text)):
        sequence.tokens.append(text[end])
        compared.clear()
        proposer.available(sequence, 4)
        most = max(most, len(compared))
    assert most == PLACES
    # 3 s would be 150 us a look-up; a search of 20,000 places takes milliseconds.
    assert time.process_time() - started < 3.0
    entries = sum(len(places) for places in proposer._indexes[sequence].ends.values())
    assert entries == len(text) - 3  # one a token
