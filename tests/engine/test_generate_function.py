"""jaxinfer.generate, the pure function: LLM's greedy tokens from inside a jit of the caller's."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import Generated, InvalidRequestError, SamplingParams, generate
from tests.helpers import tiny_llm

pytestmark = pytest.mark.optimised

NEW = 10
LENGTHS = (1, 7, 16, 17, 30)
WIDTH = 30


@pytest.fixture(scope="module")
def llm(tiny):
    with tiny_llm(tiny, max_logprobs=-1) as made:
        yield made


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, n).tolist() for n in LENGTHS]


def padded(fill: int = 0) -> tuple[jax.Array, jax.Array]:
    tokens = np.full((len(LENGTHS), WIDTH), fill, np.int32)
    for row, ids in zip(tokens, prompts(), strict=True):
        row[: len(ids)] = ids
    return jnp.asarray(tokens), jnp.asarray(LENGTHS, jnp.int32)


def run(llm, tokens, lengths, key=None, params=None, **options) -> Generated:
    """Inside a jit of ours, as callers use it."""

    @jax.jit
    def program(params, tokens, lengths, key):
        return generate(llm.model, params, tokens, lengths, max_new_tokens=NEW, key=key, **options)

    weights = llm.params if params is None else params
    return jax.tree.map(np.asarray, program(weights, tokens, lengths, key))


def of_llm(llm, **fields) -> list:
    params = SamplingParams(**{"temperature": 0, "max_tokens": NEW, "logprobs": 0, **fields})
    return [o.outputs[0] for o in llm.generate(prompts(), params)]


def rows(result: Generated) -> list[list[int]]:
    return [t[:n].tolist() for t, n in zip(result.tokens, result.lengths, strict=True)]


def check_equal(result: Generated, want: list) -> None:
    assert rows(result) == [o.token_ids for o in want]
    for i, output in enumerate(want):
        mine = result.logprobs[i][: len(output.token_ids)]
        theirs = [e[t].logprob for e, t in zip(output.logprobs, output.token_ids, strict=True)]
        np.testing.assert_allclose(mine, theirs, atol=2e-4)


def test_greedy_equals_llm(llm):
    check_equal(run(llm, *padded()), of_llm(llm, ignore_eos=True))


def test_outside_jit_and_one_row(llm):
    tokens, lengths = padded()
    result = generate(llm.model, llm.params, tokens[2:3, :16], lengths[2:3], max_new_tokens=NEW)
    assert isinstance(result, Generated)
    assert result.tokens.shape == result.logprobs.shape == (1, NEW)
    want = of_llm(llm, ignore_eos=True)[2]
    assert rows(result) == [want.token_ids]


def test_end_of_sequence_stops_each_row(llm):
    full = [o.token_ids for o in of_llm(llm, ignore_eos=True)]
    ends = (full[0][4], full[3][2])
    want = of_llm(llm, stop_token_ids=list(ends), ignore_eos=True)
    result = run(llm, *padded(), eos_id=ends)
    check_equal(result, want)
    assert min(result.lengths) < NEW
    for tokens, logprobs, n in zip(result.tokens, result.logprobs, result.lengths, strict=True):
        assert not tokens[n:].any()
        assert not logprobs[n:].any()
    single = run(llm, *padded(), eos_id=int(full[0][0]))
    assert single.lengths[0] == 1


def test_the_loop_ends_when_every_row_has(llm):
    """With the first token of each row as its end, all is over after one step."""
    first = tuple({o.token_ids[0] for o in of_llm(llm, ignore_eos=True)})
    assert run(llm, *padded(), eos_id=first).lengths.tolist() == [1] * len(LENGTHS)


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {70: 100.0}},
        {"logit_bias": {30: 3.0, 31: -3.0}, "frequency_penalty": 1.5},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
        {"repetition_penalty": 0.5},
        {"allowed_token_ids": [1, 5, 9]},
        {"allowed_token_ids": list(range(60)), "frequency_penalty": 2.0},
    ],
    ids=str,
)
def test_fields_apply_as_in_llm(llm, fields):
    result = run(llm, *padded(), sampling=SamplingParams(temperature=0, **fields))
    check_equal(result, of_llm(llm, ignore_eos=True, **fields))


def test_min_tokens(llm):
    end = of_llm(llm, ignore_eos=True)[1].token_ids[0]
    choose = {"min_tokens": 4, "logit_bias": {end: 50.0}}
    result = run(
        llm, *padded(), eos_id=end, sampling=SamplingParams(temperature=0, max_tokens=NEW, **choose)
    )
    assert result.lengths.tolist() == [5] * len(LENGTHS)
    check_equal(result, of_llm(llm, ignore_eos=True, stop_token_ids=[end], **choose))


def test_sampling_repeats_with_its_key_and_ignores_padding(llm):
    choose = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, min_p=0.001)
    tokens, lengths = padded()
    key = jax.random.key(1)
    first = run(llm, tokens, lengths, key, sampling=choose)
    assert rows(run(llm, tokens, lengths, key, sampling=choose)) == rows(first)
    assert rows(run(llm, tokens, lengths, jax.random.key(2), sampling=choose)) != rows(first)
    wide = jnp.pad(padded(fill=99)[0], ((0, 0), (0, 13)), constant_values=-5)
    assert rows(run(llm, wide, lengths, key, sampling=choose)) == rows(first)
    assert rows(run(llm, tokens[:2], lengths[:2], key, sampling=choose)) == rows(first)[:2]
    same = jnp.broadcast_to(tokens[2:3], tokens.shape)
    together = run(llm, same, jnp.full_like(lengths, 16), key, sampling=choose)
    assert len({tuple(r) for r in rows(together)}) == len(LENGTHS)


def test_nan_of_padding_reaches_nothing(llm):
    """Embedding row 7 is NaN, and stands only where the prompts are padded."""
    good = run(llm, *padded())
    leaves, tree = jax.tree_util.tree_flatten_with_path(llm.params)
    bad = jax.tree_util.tree_unflatten(
        tree,
        [
            leaf.at[7].set(jnp.nan) if "embed" in jax.tree_util.keystr(path) else leaf
            for path, leaf in leaves
        ],
    )
    clean = [[8 if t == 7 else t for t in ids] for ids in prompts()]
    tokens = np.full((len(LENGTHS), WIDTH), 7, np.int32)
    for row, ids in zip(tokens, clean, strict=True):
        row[: len(ids)] = ids
    sevens = jnp.asarray(tokens)
    zeros = jnp.asarray(np.where(np.arange(WIDTH) < np.array(LENGTHS)[:, None], tokens, 0))
    ban = SamplingParams(temperature=0, logit_bias={7: -100.0})
    want = run(llm, zeros, padded()[1], sampling=ban)
    got = run(llm, sevens, padded()[1], params=bad, sampling=ban)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.logprobs, want.logprobs)
    assert good.tokens.shape == want.tokens.shape
    # A row that has the token ends at once, with -1; the others do not notice.
    poisoned = sevens.at[4, 3].set(7)
    result = run(llm, poisoned, padded()[1], params=bad, sampling=ban)
    assert (result.lengths[4], result.tokens[4, 0]) == (1, -1)
    np.testing.assert_array_equal(result.tokens[:4], want.tokens[:4])


def test_inside_a_larger_program(llm):
    """vmap-free composition: two calls in one jit, the second fed by the first."""

    @partial(jax.jit, static_argnames="model")
    def twice(model, params, tokens, lengths):
        first = generate(model, params, tokens, lengths, max_new_tokens=3)
        longer = jnp.concatenate([tokens, first.tokens], axis=1)
        return generate(model, params, longer, lengths + 3, max_new_tokens=3)

    ids = jnp.asarray([prompts()[2]], jnp.int32)
    result = twice(llm.model, llm.params, ids, jnp.array([16], jnp.int32))
    want = of_llm(llm, ignore_eos=True)[2].token_ids[3:6]
    assert np.asarray(result.tokens)[0].tolist() == want


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": jnp.zeros((3,), jnp.int32)}, r"integers \[B, S\]; got int32\[3\]"),
        ({"tokens": jnp.zeros((2, 3))}, r"got float32\[2, 3\]"),
        ({"lengths": jnp.zeros((3,), jnp.int32)}, r"lengths must be \[B\] = \[2\].*got int32\[3\]"),
        ({"lengths": jnp.zeros((2,), jnp.float32)}, "lengths must be .*integers; got float32"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1; got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer"),
        ({"max_new_tokens": 1022}, r"3 prompt tokens \+ max_new_tokens=1022.*1024"),
        ({"tokens": jnp.zeros((2, 0), jnp.int32)}, "0 prompt tokens"),
        ({"sampling": SamplingParams(temperature=1)}, r"key=jax\.random\.key"),
        ({"sampling": SamplingParams(temperature=0, stop="x")}, r"does not apply.*\.stop"),
        ({"sampling": SamplingParams(temperature=0, bad_words=["x"])}, r"\.bad_words; use LLM"),
        ({"sampling": SamplingParams(temperature=0, stop_token_ids=[1])}, r"\.stop_token_ids"),
        ({"sampling": SamplingParams(temperature=0, prompt_logprobs=1)}, r"\.prompt_logprobs"),
        ({"sampling": SamplingParams(n=2), "key": jax.random.key(0)}, r"\.n;"),
        ({"sampling": SamplingParams(temperature=0, seed=1)}, r"\.seed"),
        ({"sampling": SamplingParams(temperature=0, allowed_token_ids=[264])}, "allowed_token_ids"),
        ({"sampling": SamplingParams(temperature=0, logit_bias={9999: 1.0})}, "logit_bias.*9999"),
        ({"sampling": {"temperature": 0}}, "sampling must be SamplingParams"),
        ({"eos_id": 264}, "eos_id.*264"),
        ({"eos_id": (2, -1)}, "eos_id.*-1"),
        ({"eos_id": "x"}, "eos_id"),
    ],
    ids=lambda v: str(v)[:30] if isinstance(v, dict) else "",
)
def test_what_cannot_be_served_is_refused(llm, change, message):
    options = {
        "tokens": jnp.zeros((2, 3), jnp.int32),
        "lengths": jnp.full((2,), 3, jnp.int32),
        "max_new_tokens": 4,
        **change,
    }
    tokens, lengths = options.pop("tokens"), options.pop("lengths")
    with pytest.raises(InvalidRequestError, match=message):
        generate(llm.model, llm.params, tokens, lengths, **options)


def test_result_is_a_pytree():
    names = [f.name for f in dataclasses.fields(Generated)]
    assert names == ["tokens", "lengths", "logprobs"]
    zeros = jnp.zeros((1,))
    assert len(jax.tree.leaves(Generated(zeros, zeros, zeros))) == 3
