"""Engine options, model folders and requests that cannot be served: a ValueError that says why."""

import math
import re

import jax
import numpy as np
import pytest

from jaxinfer import (
    LLM,
    CapacityError,
    ConfigError,
    InvalidRequestError,
    JaxInferError,
    ModelFormatError,
    SamplingParams,
    TokenizerError,
)
from tests.helpers import (
    TINY_CONFIG,
    assert_no_leak,
    greedy,
    tiny_llm,
    tiny_weights,
    write_tiny_model,
)

SMALL = {"max_num_seqs": 1, "max_num_batched_tokens": 32}


# -- engine options --------------------------------------------------------------------


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
        ({"gpu_memory_utilization": math.nan}, "gpu_memory_utilization.*nan"),
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
        ({"speculative_config": {}}, "method must be one of"),
        ({"quantization": "nf4"}, "quantization must be one of None, int8, .*fp8.*; got 'nf4'"),
        ({"quantization": "awq"}, "quantization='awq' is not how .*: it has float weights.*int8"),
        ({"quantization": "gguf"}, "quantization='gguf' is not how .*: it has float weights"),
        ({"dequantize": True}, "dequantize=True has no meaning: the weights of .* are float"),
        (
            {"dequantize": True, "quantization": "int8"},
            "dequantize=True contradicts quantiz.*'int8'",
        ),
        ({"dequantize": 1}, "dequantize must be True or False; got 1"),
        ({"quantization": 8}, "quantization must be one of None, int8, .*; got 8"),
        ({"quantization": "int4"}, "none of the group sizes 128, 64, 32 divides.*48, 96.*24, 48"),
        (
            {"quantization": "int4", "quantization_group_size": 32},
            "group_size must be an even number that divides.*48, 96.*got 32",
        ),
        (
            {"quantization": "int8", "quantization_group_size": 16},
            "group_size=16 has no meaning with quantization='int8'",
        ),
        ({"quantization_group_size": 16}, "group_size=16 has no meaning without quantization"),
        ({"quantize_lm_head": True}, "quantize_lm_head=True has no meaning without quantization"),
        ({"quantization": "int8", "quantize_lm_head": 1}, "quantize_lm_head must be True or False"),
        ({"quantization": "int4", "quantization_group_size": 1}, "group_size must be an integer"),
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


# -- model folders ---------------------------------------------------------------------


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
    "model", ["/no/such/folder", "no/such/model", "../../etc/passwd", "/etc/passwd"]
)
def test_no_such_model(model):
    with pytest.raises(ValueError, match=re.escape(model)) as caught:
        LLM(model, verbose=False)
    assert isinstance(caught.value, JaxInferError)


def test_unknown_architecture_lists_the_known(tmp_path):
    folder = write_tiny_model(tmp_path / "m", architectures=["FooForCausalLM"], model_type="foo")
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM.*Qwen3ForCausalLM.*FooForCausalLM"):
        tiny_llm(folder)


def test_weights_that_do_not_fit_the_config(tmp_path):
    folder = write_tiny_model(tmp_path / "m")
    with pytest.raises(ConfigError, match=r"num_hidden_layers must be 2.*got 3") as caught:
        tiny_llm(folder, hf_overrides={"num_hidden_layers": 3})
    assert str(folder) in str(caught.value)
    with pytest.raises(ModelFormatError, match=r"gate_proj.*96.*100|gate_proj.*100.*96"):
        tiny_llm(folder, hf_overrides={"intermediate_size": 100})


def test_weights_that_are_not_finite(tmp_path):
    weights = tiny_weights(dict(TINY_CONFIG))
    weights["model.embed_tokens.weight"][7, 3] = np.nan
    folder = write_tiny_model(tmp_path / "m", weights=weights)
    with pytest.raises(ModelFormatError, match=r"embed_tokens.*(NaN|finite)"):
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
    with pytest.raises(TokenizerError, match=r"259.*258|258.*259|258"):
        tiny_llm(folder)
    with tiny_llm(folder, skip_tokenizer_init=True, **SMALL) as llm:
        assert len(llm.generate([1, 2], greedy())[0].outputs[0].token_ids) == 8


# -- capacity --------------------------------------------------------------------------


def test_a_request_that_can_never_fit(tiny):
    with tiny_llm(tiny, num_pages=8, **SMALL) as llm:
        assert llm.config.max_model_len == 64  # lowered to what the pages hold
        with pytest.raises(InvalidRequestError, match="max_model_len"):
            llm.generate([1] * 60, greedy())
        llm.cache_prompt([5] * 32, pin=True)
        for call in (
            lambda: llm.generate([1] * 50, greedy(max_tokens=6)),
            lambda: llm.cache_prompt([1] * 50),
        ):
            with pytest.raises(CapacityError, match=r"needs 7 pages.*not pinned"):
                call()
        outputs = llm.generate([[1] * 50, [1] * 20], greedy(max_tokens=6))
        assert isinstance(outputs[0].error, CapacityError)
        assert outputs[1].error is None
        assert llm.generate([5] * 40, greedy())[0].num_cached_tokens == 32
        llm.unpin_prompt([5] * 32)
        assert llm.generate([1] * 50, greedy(max_tokens=6))[0].error is None
        assert_no_leak(llm)


def test_the_queue_is_bounded(tiny):
    with tiny_llm(tiny, max_num_waiting=3, max_num_seqs=2, max_num_batched_tokens=32) as llm:
        for i in range(3):
            llm.add_request(str(i), "waits", greedy())
        with pytest.raises(CapacityError, match=r"max_num_waiting=3.*try again"):
            llm.add_request("more", "x", greedy())
        while llm.has_unfinished_requests():
            llm.step()
        outputs = llm.generate(["many"] * 12, greedy())  # a list waits for its turn
        assert all(o.error is None for o in outputs)
        sampled = SamplingParams(n=4, max_tokens=1)
        with pytest.raises(CapacityError, match="max_num_waiting=3"):
            llm.generate("too many samples", sampled)
        assert_no_leak(llm)
