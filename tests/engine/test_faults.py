"""NaN, bans, Ctrl-C and device faults: only what must end ends, and nothing leaks."""

import _thread

import jax
import numpy as np
import pytest

from jaxinfer import (
    LLM,
    EngineDeadError,
    InvalidRequestError,
    NumericalError,
    SamplingParams,
)
from jaxinfer.errors import RecompileError
from tests.helpers import assert_no_leak, greedy, tiny_llm

SMALL = {"max_num_seqs": 1, "max_num_batched_tokens": 32}


@pytest.fixture(scope="module")
def shared(tiny):
    with tiny_llm(tiny, max_model_len=128, num_pages=60) as made:
        yield made


@pytest.fixture(scope="module")
def good_tokens(shared) -> list[int]:
    return shared.generate("a good one", greedy())[0].outputs[0].token_ids


@pytest.fixture
def llm(llm: LLM, good_tokens):
    """As in all modules; after the test a good request succeeds, too."""
    yield llm
    assert llm.generate("a good one", greedy())[0].outputs[0].token_ids == good_tokens


# -- numbers that are not finite -------------------------------------------------------


@pytest.fixture
def poisoned(llm):
    """Token 7's embedding is NaN; the weights are put back after the test."""
    runner = llm.engine.runner
    leaves, tree = jax.tree_util.tree_flatten_with_path(runner.params)
    bad = [
        leaf.at[7].set(np.nan) if "embed" in jax.tree_util.keystr(path) else leaf
        for path, leaf in leaves
    ]
    assert sum(a is not b for a, (_, b) in zip(bad, leaves, strict=True)) == 1
    good = runner.params
    runner.params = jax.tree_util.tree_unflatten(tree, bad)
    yield llm
    runner.params = good
    llm.reset_prefix_cache()


@pytest.mark.parametrize("at", [0, 5, 20, 90])
def test_nan_ends_only_the_requests_that_have_the_token(poisoned, good_tokens, at):
    llm = poisoned
    clean = [9] * 100
    bad = [*clean[:at], 7, *clean[at + 1 :]]
    outputs = llm.generate(["a good one", bad, "a good one", [7]], greedy())
    assert [o.error is None for o in outputs] == [True, False, True, False]
    for i in (1, 3):
        assert isinstance(outputs[i].error, NumericalError)
        assert outputs[i].outputs[0].finish_reason == "error"
        assert outputs[i].outputs[0].token_ids == []
    for i in (0, 2):
        assert outputs[i].outputs[0].token_ids == good_tokens
    with pytest.raises(NumericalError, match="NaN or infinite logits"):
        llm.generate(bad, greedy())
    cache = llm.engine.scheduler.cache
    assert all(7 not in node.tokens for node in cache.nodes())
    want = llm.generate({"prompt_token_ids": clean, "cache_salt": "new"}, greedy())[0]
    assert want.num_cached_tokens == 0
    assert llm.generate(clean, greedy())[0].outputs[0].token_ids == want.outputs[0].token_ids


def test_nan_in_a_token_that_was_generated(poisoned):
    params = greedy(logit_bias={7: 100}, max_tokens=10)
    output = poisoned.generate(["make a seven"], params)[0]
    assert isinstance(output.error, NumericalError)
    assert output.outputs[0].token_ids == [7]
    errors = [o.error for o in poisoned.stream("make a seven", params)]
    assert errors[0] is None
    assert isinstance(errors[-1], NumericalError)


def test_nan_in_a_cached_prompt(poisoned):
    with pytest.raises(NumericalError):
        poisoned.cache_prompt([9] * 30 + [7])
    assert poisoned.generate([9] * 30, greedy())[0].error is None


def test_nan_ends_every_sample(poisoned):
    output = poisoned.generate([[7, 7]], SamplingParams(n=3, max_tokens=4))[0]
    assert isinstance(output.error, NumericalError)
    assert [o.finish_reason for o in output.outputs] == ["error"] * 3


def test_nothing_is_allowed(llm, good_tokens):
    text = llm.get_tokenizer().decode([65])
    params = greedy(allowed_token_ids=[65], bad_words=[text])
    outputs = llm.generate(["banned", "a good one"], [params, greedy()])
    assert isinstance(outputs[0].error, InvalidRequestError)
    assert "no token is allowed" in str(outputs[0].error)
    assert outputs[1].outputs[0].token_ids == good_tokens
    only_stop = greedy(allowed_token_ids=[70], stop_token_ids=[70], min_tokens=2)
    with pytest.raises(InvalidRequestError, match="min_tokens together ban the whole vocabulary"):
        llm.generate("banned", only_stop)


# -- faults ----------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(5))
def test_ctrl_c_at_a_step(llm, good_tokens, monkeypatch, step):
    """Raised in the runner, where it would leave a plan that never ran."""
    runner = llm.engine.runner
    real, count = runner.run, [0]

    def run(*args):
        count[0] += 1
        if count[0] == step + 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(runner, "run", run)
    biased = greedy(max_tokens=20, logit_bias={70: 100})
    with pytest.raises(KeyboardInterrupt):
        llm.generate([list(range(90)), "b", "c"], [greedy(max_tokens=20), biased, greedy()])
    assert count[0] == step + 1
    assert not llm.engine.has_work
    assert_no_leak(llm)
    # The bias row whose upload was lost is uploaded again.
    assert llm.generate("b", biased)[0].outputs[0].token_ids == [70] * 20


def test_ctrl_c_at_a_step_of_another_caller(llm, monkeypatch):
    stream = llm.stream("a stream that is open", greedy(max_tokens=30))
    next(stream)
    runner = llm.engine.runner
    with monkeypatch.context() as patch:
        patch.setattr(runner, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            llm.generate("interrupted", greedy())
    rest = list(stream)
    assert rest[-1].finished
    assert rest[-1].outputs[0].finish_reason == "abort"


def test_a_signal_is_raised_between_steps(llm, monkeypatch):
    """A real SIGINT while the books are open: the step ends first, other streams lose nothing."""
    want = llm.generate("the stream", greedy(max_tokens=12))[0].outputs[0].token_ids
    stream = llm.stream("the stream", greedy(max_tokens=12))
    tokens = list(next(stream).outputs[0].token_ids)
    scheduler = llm.engine.scheduler
    real = scheduler.commit

    def commit(*args):
        _thread.interrupt_main()
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "commit", commit)
        with pytest.raises(KeyboardInterrupt):
            llm.generate("interrupted", greedy(max_tokens=50))
    assert scheduler.num_running == 1
    tokens += [t for d in stream for t in d.outputs[0].token_ids]
    assert tokens == want


def test_recompile_in_strict_mode_ends_its_requests_only(tiny):
    with tiny_llm(tiny, strict=True, **SMALL) as llm:
        llm.warmup(use_tqdm=False)
        assert llm.generate("fine", greedy())[0].error is None
        # What the user compiles is the user's affair.
        jax.jit(lambda x: x + np.float32(41.5))(np.float32(1)).block_until_ready()
        assert llm.generate("also fine", greedy())[0].error is None
        llm.engine.runner._programs.clear()
        with pytest.raises(RecompileError, match="strict=True: 1 program"):
            llm.generate("late", greedy())
        assert_no_leak(llm)


def test_a_device_fault_ends_the_engine(tiny, monkeypatch):
    llm = tiny_llm(tiny, **SMALL)
    want = llm.generate("first", greedy())[0].outputs[0].token_ids
    assert len(want) == 8
    stream = llm.stream("open", greedy())
    next(stream)

    def broken(*_):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(llm.engine.runner, "run", broken)
    with pytest.raises(EngineDeadError, match=r"the device is gone.*make a new LLM"):
        llm.generate("x", greedy())
    for call in CALLS:
        with pytest.raises(EngineDeadError, match="make a new LLM"):
            call(llm)
    with pytest.raises(EngineDeadError):
        next(stream)
    llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate("x")


CALLS = [
    lambda llm: llm.generate("x", greedy()),
    lambda llm: llm.generate(["x", "y"], greedy()),
    lambda llm: llm.chat([{"role": "user", "content": "x"}]),
    lambda llm: list(llm.stream("x")),
    lambda llm: llm.add_request("1", "x"),
    lambda llm: llm.step(),
    lambda llm: llm.abort("1"),
    lambda llm: llm.cache_prompt("a prompt"),
    lambda llm: llm.unpin_prompt("a prompt"),
    lambda llm: llm.reset_prefix_cache(),
    lambda llm: llm.warmup(),
]


def test_use_after_close(tiny):
    llm = tiny_llm(tiny, **SMALL)
    llm.generate("x", greedy())
    stream = llm.stream("open", greedy())
    next(stream)
    llm.close()
    llm.close()
    for call in CALLS:
        with pytest.raises(EngineDeadError, match="it was closed"):
            call(llm)
    with pytest.raises(EngineDeadError):
        next(stream)
    assert llm.get_metrics()["num_running"] == 0
    assert llm.get_tokenizer().encode("x")
