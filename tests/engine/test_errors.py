"""Bad input and faults: the error names value and remedy, what else runs is unharmed, nothing leaks."""

import _thread
import math
import re
from typing import Any

import jax
import numpy as np
import pytest

from jaxinfer import (
    LLM,
    CapacityError,
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    JaxInferError,
    ModelFormatError,
    NumericalError,
    SamplingParams,
    TokenizerError,
)
from jaxinfer.errors import RecompileError
from tests.helpers import (
    TINY_CONFIG,
    VOCAB_SIZE,
    assert_no_leak,
    tiny_llm,
    tiny_weights,
    write_tiny_model,
)

SMALL = {"max_num_seqs": 1, "max_num_batched_tokens": 32}
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def shared(tiny):
    with tiny_llm(tiny, max_model_len=128, num_pages=60) as made:
        yield made


@pytest.fixture(scope="module")
def good_tokens(shared) -> list[int]:
    return shared.generate("a good one", greedy())[0].outputs[0].token_ids


@pytest.fixture
def llm(shared: LLM, good_tokens):
    """The module's engine; after the test a good request succeeds and no page is gone."""
    shared.reset_prefix_cache()
    yield shared
    assert shared.generate("a good one", greedy())[0].outputs[0].token_ids == good_tokens
    assert_no_leak(shared)


def greedy(**fields) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 6, "ignore_eos": True, **fields})


# -- sampling parameters ------------------------------------------------------------------------------

HUGE = 10**400
BAD_PARAMS: list[tuple[str, Any]] = [
    *[("temperature", v) for v in (NAN, INF, -INF, -1, 1e999, "1", None, True, [1], HUGE)],
    *[("top_p", v) for v in (0, 1.0000001, -1, NAN, "x")],
    *[("min_p", v) for v in (1.5, -0.1, NAN)],
    *[("top_k", v) for v in (-2, 1.5, True, "5")],
    *[("max_tokens", v) for v in (0, -1, 1.5, True, 2**31, 2**63, HUGE)],
    *[("min_tokens", v) for v in (-1, 7, 1.0)],
    *[("n", v) for v in (0, -1, 2, 17, 16385, 10**9, 1.0, True)],  # 2: the request is greedy
    *[("seed", v) for v in (2**63, -(2**63) - 1, 1.5, True, "1")],
    *[("stop", v) for v in ("", [""], ["x"] * 17, "x" * 257, [1], 5, b"x")],
    *[("stop_token_ids", v) for v in ([-1], [VOCAB_SIZE], [1.0], [True], 5, "5")],
    *[("logit_bias", v) for v in ({-1: 0.0}, {VOCAB_SIZE: 0.0}, {"abc": 1.0}, {10**9: 1.0})],
    *[("logit_bias", v) for v in ({1: NAN}, {1: 101}, {1: -101}, {1: "x"}, [1], {True: 1.0})],
    ("logit_bias", {i: 0.0 for i in range(1025)}),
    *[("allowed_token_ids", v) for v in ([], [-1], [VOCAB_SIZE], [2**40], [1.5], "x")],
    *[("bad_words", v) for v in ([""], [1], "word")],
    *[("logprobs", v) for v in (21, -2, True, 1.5)],
    *[("prompt_logprobs", v) for v in (21, -2, True)],
    *[("presence_penalty", v) for v in (2.1, -2.1, NAN, "x")],
    *[("frequency_penalty", v) for v in (3, INF)],
    *[("repetition_penalty", v) for v in (0, -1, 2.1, NAN)],
    *[("ignore_eos", v) for v in (1, None)],
    *[("detokenize", v) for v in (0, "no")],
    *[("output_kind", v) for v in ("DELTA", 1)],
]


@pytest.mark.parametrize(
    ("name", "value"), BAD_PARAMS, ids=lambda v: re.sub(r"\W+", "", repr(v))[:20]
)
def test_bad_sampling_params(llm, name, value):
    with pytest.raises(InvalidRequestError) as caught:
        llm.generate("hello", greedy(**{name: value}))
    assert isinstance(caught.value, ValueError)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("value", [0, -0.0, 1e-45, 1e-6])
def test_temperatures_that_are_greedy(llm, good_tokens, value):
    output = llm.generate("a good one", greedy(temperature=value))[0]
    assert output.outputs[0].token_ids == good_tokens


def test_unknown_and_later_fields(llm):
    with pytest.raises(InvalidRequestError, match="did you mean 'temperature'"):
        SamplingParams(temprature=1)  # type: ignore[call-arg]
    for name in ("structured_outputs", "logits_processors", "use_beam_search", "guided_decoding"):
        with pytest.raises(InvalidRequestError, match=f"{name}: .*not available yet"):
            SamplingParams(**{name: 1})
    with pytest.raises(InvalidRequestError, match="keyword arguments only"):
        SamplingParams(1)  # type: ignore[call-arg]
    for wrong in ({"temperature": 0}, "greedy", 5):
        with pytest.raises(InvalidRequestError, match="sampling_params must be SamplingParams"):
            llm.generate("x", wrong)  # type: ignore[arg-type]


def test_changing_params_afterwards_is_checked_as_well(llm):
    """SamplingParams is mutable, as vLLM's; a bad value set later must not reach the device."""
    params = greedy()
    params.temperature = NAN
    with pytest.raises(InvalidRequestError, match="temperature"):
        llm.generate("x", params)


# -- prompts ------------------------------------------------------------------------------------------

BAD_PROMPTS: list[tuple[Any, str]] = [
    ("", "empty"),
    ([], "empty list"),
    ({"prompt": ""}, "empty"),
    ({"prompt_token_ids": []}, "empty"),
    ({}, "needs 'prompt'"),
    ({"prompt": None}, "needs 'prompt'"),
    ({"prompt": 5}, "must be a string"),
    ({"prompt_token_ids": "abc"}, "list of token ids"),
    ({"prompt_token_ids": np.array([1])}, "list of token ids"),
    ({"promt": "x"}, "did you mean 'prompt'"),
    ({"prompt": "x", "multi_modal_data": {}}, "multi_modal_data.*not supported"),
    ({"prompt": "x", "prompt_embeds": 1}, "prompt_embeds.*not supported"),
    ({"prompt": "x", "cache_salt": 5}, "cache_salt"),
    ([-1], r"\[0\].*0\.\.263.*-1"),
    ([VOCAB_SIZE], r"\[0\].*0\.\.263.*264"),
    ([1, 2**31], r"\[1\]"),
    ([1, 2**40], r"\[1\]"),
    ([1.0], r"\[0\].*1\.0"),
    ([True], r"\[0\].*True"),
    ([1, "1"], r"\[1\].*'1'"),
    ([1, None], r"\[1\].*None"),
    ([1, 2, HUGE], r"\[2\]"),
    ("\ud800", "surrogate|UTF-8"),
    (None, "NoneType"),
    (5, "int"),
    (b"bytes", "bytes"),
    ({1, 2}, "set"),
    ([1] * 128, r"128 tokens.*max_model_len is 128"),
    ([1] * 129, r"129 tokens"),
    ("x" * 127, r"127 tokens.*max_tokens \(6\).*128.*<= 1"),
    ("a" * 2_000_000, "characters.*max_model_len=128"),
    ("👩" * 500_000, "characters.*max_model_len=128"),
    (" " * 2_000_000, "characters.*max_model_len=128"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS, ids=range(len(BAD_PROMPTS)))
def test_bad_prompt(llm, prompt, message):
    with pytest.raises(InvalidRequestError, match=f"(?s){message}") as caught:
        llm.generate(prompt, greedy())
    assert len(str(caught.value)) < 400
    with pytest.raises(InvalidRequestError):
        list(llm.stream(prompt, greedy()))
    if prompt != []:
        with pytest.raises(InvalidRequestError):
            llm.add_request("bad", prompt, greedy())
    assert not llm.has_unfinished_requests()


@pytest.mark.parametrize(
    "bad", ["", [], [VOCAB_SIZE], [[]], None, 5, {"x": 1}, [1] * 200, "\ud800"], ids=repr
)
def test_a_bad_prompt_fails_alone(llm, good_tokens, bad):
    outputs = llm.generate(["a good one", bad, "a good one"], greedy())
    assert [o.error is None for o in outputs] == [True, False, True]
    assert isinstance(outputs[1].error, InvalidRequestError)
    assert outputs[1].finished
    assert outputs[1].outputs[0].finish_reason == "error"
    for i in (0, 2):
        assert outputs[i].outputs[0].token_ids == good_tokens


def test_bad_params_of_one_prompt_fail_alone(llm, good_tokens):
    params = [greedy(), greedy(stop_token_ids=[10**6]), "none", greedy()]
    outputs = llm.generate(["a good one"] * 4, params)  # type: ignore[arg-type]
    assert [o.error is None for o in outputs] == [True, False, False, True]
    assert outputs[3].outputs[0].token_ids == good_tokens


def test_a_list_of_one_bad_prompt_does_not_raise(llm):
    outputs = llm.generate([""], greedy())
    assert isinstance(outputs[0].error, InvalidRequestError)


def test_prompts_at_the_edge_of_the_context(llm):
    assert len(llm.generate([1] * 127, greedy(max_tokens=1))[0].outputs[0].token_ids) == 1
    exact = llm.generate([1] * 122, greedy())[0].outputs[0]
    assert (len(exact.token_ids), exact.finish_reason) == (6, "length")
    repeated = llm.generate([7] * 100, greedy(max_tokens=28))[0].outputs[0]
    assert repeated.finish_reason == "length"


BAD_MESSAGES: list[Any] = [
    [],
    None,
    "text",
    {"role": "user", "content": "x"},
    [{}],
    [{"content": "x"}],
    [{"role": 5, "content": "x"}],
    [{"role": "root", "content": "x"}],
    [{"role": "user"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    ["hello"],
    [5],
]


@pytest.mark.parametrize("messages", BAD_MESSAGES, ids=repr)
def test_malformed_messages(llm, messages):
    with pytest.raises(InvalidRequestError) as caught:
        llm.chat(messages, greedy())
    assert re.search("messages|content|role", str(caught.value))


def test_one_malformed_conversation_fails_alone(llm):
    good = [{"role": "user", "content": "hi"}]
    outputs = llm.chat([good, [{"role": "root", "content": "x"}], [], good], greedy())
    assert [o.error is None for o in outputs] == [True, False, False, True]


def test_chat_without_a_template(llm, monkeypatch):
    with pytest.raises(InvalidRequestError, match="template"):
        llm.chat([{"role": "user", "content": "x"}], chat_template="{% broken")


# -- engine options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 1}, "max_model_len must be an integer >= 2; got 1"),
        ({"max_model_len": 1025}, "1025 exceeds the model's 1024.*hf_overrides"),
        ({"max_num_seqs": 0}, "max_num_seqs.*got 0"),
        ({"max_num_seqs": 2.0}, "max_num_seqs.*got 2.0"),
        ({"max_num_batched_tokens": 4}, r"max_num_batched_tokens \(4\).*max_num_seqs \(8\)"),
        ({"page_size": 7}, "page_size.*power of two.*got 7"),
        ({"page_size": 512}, "page_size.*got 512"),
        ({"num_pages": 0}, "num_pages.*got 0"),
        ({"num_pages": True}, "num_pages.*got True"),
        ({"num_pages": None, "kv_cache_memory_bytes": 100}, "no page fits.*kv_cache_memory_bytes"),
        ({"num_pages": 4, "max_model_len": 64}, "needs 8 pages.*the pool has 4.*lower"),
        ({"gpu_memory_utilization": 0}, r"gpu_memory_utilization.*\(0, 1\].*got 0"),
        ({"gpu_memory_utilization": NAN}, "gpu_memory_utilization.*nan"),
        ({"dtype": "float8"}, "dtype must be one of auto.*got 'float8'"),
        ({"load_format": "pt"}, "load_format.*'pt'"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy.*'lifo'"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching must be True or False; got 1"),
        ({"seed": "x"}, "seed.*'x'"),
        ({"max_n": 0}, "max_n.*got 0"),
        ({"max_logprobs": -2}, "max_logprobs.*got -2"),
        ({"tensor_parallel_size": 2}, "several devices are not available yet; use 1"),
        ({"attention_impl": "flash9"}, "flash9"),
        ({"max_num_seq": 4}, "no option 'max_num_seq'; did you mean 'max_num_seqs'"),
        ({"speculative_config": {}}, "speculative decoding is not available yet"),
        ({"quantization": "awq"}, "quantised compute is not available yet"),
        ({"pipeline_parallel_size": 2}, "several devices is not available yet|are not available"),
        ({"block_size": 16}, "block_size is not an option here; use page_size"),
        ({"trust_remote_code": True}, "never run"),
        ({"compilation_cache_dir": "/proc/none"}, "/proc/none cannot be used.*writable folder"),
        ({"hf_overrides": {"num_attention_heads": 0}}, "num_attention_heads|num_heads"),
        ({"hf_overrides": 5}, "hf_overrides"),
        ({"chat_template": "{% broken"}, "chat_template|chat template"),
        ({"chat_template": 5}, "chat_template|chat template"),
        ({"tokenizer": "/no/such/folder"}, "/no/such/folder"),
        ({"skip_tokenizer_init": "yes"}, "skip_tokenizer_init"),
        ({"verbose": "yes"}, "verbose.*'yes'"),
        ({"revision": 5}, "revision"),
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, dict) else "",
)
def test_bad_engine_options(tiny, options, message):
    before = live_bytes()
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        tiny_llm(tiny, **options)
    assert isinstance(caught.value, JaxInferError)
    del caught
    assert live_bytes() <= before


def live_bytes() -> int:
    return sum(a.nbytes for a in jax.live_arrays())


# -- model folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("config.json", "config.json"),
        ("model.safetensors", "safetensors|weights"),
        ("tokenizer.json", "tokenizer"),
    ],
)
def test_a_folder_with_a_file_missing(tmp_path, remove, message):
    folder = write_tiny_model(tmp_path / "m")
    (folder / remove).unlink()
    with pytest.raises(ValueError, match=message) as caught:
        tiny_llm(folder)
    assert isinstance(caught.value, JaxInferError)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "model", ["/no/such/folder", "", "no/such/model", "../../etc/passwd", "/etc/passwd"]
)
def test_no_such_model(model):
    with pytest.raises(ValueError, match=re.escape(model)) as caught:
        LLM(model, verbose=False)
    assert isinstance(caught.value, JaxInferError)


def test_unknown_architecture_lists_the_known(tmp_path):
    folder = write_tiny_model(tmp_path / "m", architectures=["FooForCausalLM"], model_type="foo")
    with pytest.raises(ConfigError, match="FooForCausalLM.*LlamaForCausalLM.*Qwen3ForCausalLM"):
        tiny_llm(folder)


def test_weights_that_do_not_fit_the_config(tmp_path):
    folder = write_tiny_model(tmp_path / "m")
    with pytest.raises(ModelFormatError, match="layers.2") as caught:
        tiny_llm(folder, hf_overrides={"num_hidden_layers": 3})
    assert str(folder) in str(caught.value)
    with pytest.raises(ModelFormatError, match=r"gate_proj.*96.*100|gate_proj.*100.*96"):
        tiny_llm(folder, hf_overrides={"intermediate_size": 100})


def test_weights_that_are_not_finite(tmp_path):
    weights = tiny_weights(dict(TINY_CONFIG))
    weights["model.embed_tokens.weight"][7, 3] = np.nan
    folder = write_tiny_model(tmp_path / "m", weights=weights)
    with pytest.raises(ModelFormatError, match="embed_tokens.*(NaN|finite)"):
        tiny_llm(folder)


def test_truncated_weights(tmp_path):
    folder = write_tiny_model(tmp_path / "m")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelFormatError, match=r"model\.safetensors"):
        tiny_llm(folder)


def test_tokenizer_larger_than_the_embedding(tmp_path):
    config = {**TINY_CONFIG, "vocab_size": 258, "eos_token_id": 2}
    folder = write_tiny_model(
        tmp_path / "m", weights=tiny_weights(config), vocab_size=258, eos_token_id=2
    )
    with pytest.raises(TokenizerError, match="259.*258|258.*259|258"):
        tiny_llm(folder)
    with tiny_llm(folder, skip_tokenizer_init=True, **SMALL) as llm:
        assert len(llm.generate([1, 2], greedy())[0].outputs[0].token_ids) == 6


# -- capacity -----------------------------------------------------------------------------------------


def test_a_request_that_can_never_fit(tiny):
    with tiny_llm(tiny, num_pages=8, **SMALL) as llm:
        assert llm.config.max_model_len == 64  # lowered to what the pages hold
        with pytest.raises(InvalidRequestError, match="max_model_len"):
            llm.generate([1] * 60, greedy())
        llm.cache_prompt([5] * 32, pin=True)
        for call in (
            lambda: llm.generate([1] * 50, greedy()),
            lambda: llm.cache_prompt([1] * 50),
        ):
            with pytest.raises(CapacityError, match="needs 7 pages.*not pinned"):
                call()
        outputs = llm.generate([[1] * 50, [1] * 20], greedy())
        assert isinstance(outputs[0].error, CapacityError)
        assert outputs[1].error is None
        assert llm.generate([5] * 40, greedy())[0].num_cached_tokens == 32
        llm.unpin_prompt([5] * 32)
        assert llm.generate([1] * 50, greedy())[0].error is None
        assert_no_leak(llm)


def test_the_queue_is_bounded(tiny):
    with tiny_llm(tiny, max_num_waiting=3, max_num_seqs=2, max_num_batched_tokens=32) as llm:
        for i in range(3):
            llm.add_request(str(i), "waits", greedy())
        with pytest.raises(CapacityError, match="max_num_waiting=3.*try again"):
            llm.add_request("more", "x", greedy())
        while llm.has_unfinished_requests():
            llm.step()
        outputs = llm.generate(["many"] * 12, greedy())  # a list waits for its turn
        assert all(o.error is None for o in outputs)
        sampled = SamplingParams(n=4, max_tokens=1)
        with pytest.raises(CapacityError, match="max_num_waiting=3"):
            llm.generate("too many samples", sampled)
        assert_no_leak(llm)


# -- numbers that are not finite ----------------------------------------------------------------------


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


# -- faults -------------------------------------------------------------------------------------------


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
        jax.jit(lambda x: x + np.float32(41.5))(np.float32(1)).block_until_ready()
        with pytest.raises(RecompileError, match="strict=True: 1 program"):
            llm.generate("late", greedy())
        assert_no_leak(llm)


def test_a_device_fault_ends_the_engine(tiny, monkeypatch):
    llm = tiny_llm(tiny, **SMALL)
    want = llm.generate("first", greedy())[0].outputs[0].token_ids
    assert len(want) == 6
    stream = llm.stream("open", greedy())
    next(stream)

    def broken(*_):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(llm.engine.runner, "run", broken)
    with pytest.raises(EngineDeadError, match="the device is gone.*make a new LLM"):
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
