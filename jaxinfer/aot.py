"""The engine's steps as programs that `python -m pallas_kernels.aot` compiles for chips that are
not there: whole decode and prefill steps of published model shapes, as a user would run them.

Found through the entry point group "pallas_kernels.aot", so that the kernels know nothing of the
engine.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import kv_cache, models, weights
from jaxinfer.batch import Layout
from jaxinfer.buckets import Bucket
from jaxinfer.quant import schemes
from jaxinfer.step import step
from pallas_kernels import Spec, resolve
from pallas_kernels.aot import CHIPS, Program
from pallas_kernels.aot_cases import MAY_COPY_SCALES
from pallas_kernels.common import QUANTISED

GIB = 2**30

_LLAMA_3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "bos_token_id": 128000,
    "eos_token_id": 128009,
    "torch_dtype": "bfloat16",
}
_LLAMA_3_1_8B = _LLAMA_3 | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
_LLAMA_3_2_3B = _LLAMA_3 | {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}

# chip -> (model's name, its config.json, bytes of pages, page size, rows of a step, tokens of a
# prefill step)
_PLANS: dict[str, tuple[str, dict[str, Any], int, int, int, int]] = {
    "v5e": ("Llama-3.2-3B", _LLAMA_3_2_3B, 4 * GIB, 128, 64, 2048),
    "v6e": ("Llama-3.1-8B", _LLAMA_3_1_8B, 8 * GIB, 128, 128, 2048),
    "h200": ("Llama-3.1-8B", _LLAMA_3_1_8B, 96 * GIB, 64, 256, 2048),
}
_MAX_MODEL_LEN = 8192
_QUANTISED_ON = ("v6e", "h200")
"""Chips for which the mixed step, which has the kernels of both, is there with 8-bit pages too, and
both steps of a model of _FEW_LAYERS with quantised weights."""
_SCHEMES = ("int8", "int8_weight_only", "int4", "fp8")
_FEW_LAYERS = 2
_QUANTISED_TOKENS = 1792
"""Of their mixed step. Neither they nor twice as many, the rows of two digits, are a weight's
outputs: a product would look like the weight in floats."""


def programs(chip_name: str) -> list[Program]:
    """The decode step and the mixed (prefill) step, bfloat16, for a chip of `pallas_kernels.aot`;
    none for a chip whose memory no plan is made for."""
    if chip_name not in _PLANS:
        return []
    rows, tokens = _PLANS[chip_name][4:]
    decode, mixed = Bucket(rows, rows), Bucket(tokens, rows)
    found = [_program(chip_name, "bfloat16", bucket) for bucket in (decode, mixed)]
    if chip_name in _QUANTISED_ON:
        found += [_program(chip_name, dtype, mixed) for dtype in ("int8", "float8_e4m3fn")]
        for scheme in _SCHEMES:
            for bucket in (decode, Bucket(_QUANTISED_TOKENS, rows)):
                found.append(_program(chip_name, "bfloat16", bucket, scheme))
    return found


def _program(chip_name: str, page_dtype: str, bucket: Bucket, scheme: str | None = None) -> Program:
    """The step of `bucket` in bfloat16 with pages of `page_dtype`; with weights quantised as
    `scheme` says, that of the model's first layers and its head."""
    chip = CHIPS[chip_name]
    name, hf_config, page_memory, page_size, rows, _ = _PLANS[chip_name]
    if scheme is not None:
        page_memory = page_memory * _FEW_LAYERS // hf_config["num_hidden_layers"]
        hf_config = hf_config | {"num_hidden_layers": _FEW_LAYERS}
    config = weights.config_from_hf(hf_config, None)
    spec = Spec(
        config.num_heads, config.num_kv_heads, config.head_dim, page_size, "bfloat16", page_dtype
    )
    ops = resolve("auto", chip.platform, spec=spec, device_kind=chip.device_kind)
    model = models.build(config, ops, "bfloat16", page_dtype)
    if scheme is not None:
        formats = schemes.choose(scheme, model.rules, config, head=True)
        model = replace(model, formats=formats)
    num_pages = page_memory // model.page_bytes(page_size)
    pages = jax.eval_shape(partial(kv_cache.allocate, model, num_pages, page_size))
    layout = Layout(bucket, pages_per_row=_MAX_MODEL_LEN // page_size)
    moves_scales = ops.name == "tpu" and page_dtype in QUANTISED
    # Of int4 weights XLA for GPUs writes a float copy, and many rows are XLA's there.
    unpacks = chip.platform == "gpu" and scheme == "int4" and not bucket.decode_only
    kind = "" if page_dtype == "bfloat16" else f" {page_dtype} pages"
    kind += "" if scheme is None else f" {scheme}, {_FEW_LAYERS} layers"
    return Program(
        name=f"step {name} {bucket}{kind}",
        function=partial(step, model, layout, num_top=20, valid_vocab=config.vocab_size),
        args=(
            model.shapes(),
            pages,
            jax.ShapeDtypeStruct((rows + 1, config.vocab_size), jnp.float32),
            jax.ShapeDtypeStruct((rows,), jnp.int32),
            jax.ShapeDtypeStruct((layout.size,), jnp.int32),
        ),
        donate=("pages",),
        packed=() if unpacks else ("params",),
        may_copy=MAY_COPY_SCALES if moves_scales else None,
        may_copy_dtype="float32" if moves_scales else None,
        note=f"{ops.name}, {num_pages} pages of {page_size}",
    )
