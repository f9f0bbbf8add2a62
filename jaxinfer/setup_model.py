"""What a model, or a draft model, gets from an EngineConfig: dtype, kernels, tokenizer, weights."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxinfer import tokenizer as tokenizers
from jaxinfer import weights
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.errors import ConfigError
from jaxinfer.models import Model
from jaxinfer.params import flatten
from jaxinfer.quant import schemes
from jaxinfer.quant.arrays import QuantArray
from jaxinfer.quant.rounding import quantise
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.weights import memory
from pallas_kernels import dispatch


def open_source(config: EngineConfig) -> weights.ModelSource:
    """The model that `config` names, open and checked; with dummy weights it needs none."""
    return weights.open_model(
        config.model,
        hf_overrides=config.hf_overrides,
        revision=config.revision,
        weights=config.load_format != "dummy",
    )


def choose_dtype(config: EngineConfig, model_config: ModelConfig, platform: str) -> str:
    if config.dtype != "auto":
        return config.dtype
    return "float32" if platform == "cpu" else model_config.dtype


def page_dtype(config: EngineConfig, dtype: str) -> str:
    """What pages hold under `config.kv_cache_dtype`, by jax's name; `dtype` is the model's."""
    return {"auto": dtype, "int8": "int8"}.get(config.kv_cache_dtype, "float8_e4m3fn")


def resolve_ops(
    config: EngineConfig, model_config: ModelConfig, dtype: str, platform: str
) -> dispatch.Ops:
    spec = dispatch.Spec(
        num_heads=model_config.num_heads,
        num_kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        page_size=config.page_size or 0,
        dtype=dtype,
        page_dtype=page_dtype(config, dtype),
    )
    try:
        return dispatch.resolve(config.attention_impl, platform, spec=spec)
    except ValueError as error:
        remedy = "leave attention_impl out"
        if config.kv_cache_dtype != "auto":
            remedy += f", or kv_cache_dtype, which is {config.kv_cache_dtype!r}"
        message = f"attention_impl: {error}; {remedy}"
        raise ConfigError(message, field="attention_impl") from None


def quantised(config: EngineConfig, model: Model, source: weights.ModelSource) -> Model:
    """The model with the weights quantised that `config.quantization` says."""
    if config.quantization is None:
        return model
    if source.quantised is not None:
        raise ConfigError(
            f"quantization={config.quantization!r} would round weights a second time that "
            f"{source.path} has as {source.quantised.describe()}; leave quantization out, or name "
            "the float checkpoint",
            field="quantization",
        )
    formats = schemes.choose(
        config.quantization,
        model.rules,
        model.config,
        group_size=config.quantization_group_size,
        head=config.quantize_lm_head,
    )
    return replace(model, formats=formats)


def open_tokenizer(config: EngineConfig, source: weights.ModelSource) -> Tokenizer | None:
    if config.skip_tokenizer_init:
        return None
    if config.tokenizer is not None:
        tokenizer = tokenizers.from_directory(config.tokenizer)
    elif source.gguf_metadata is not None:
        tokenizer = tokenizers.from_gguf(source.gguf_metadata, source.path)
    else:
        tokenizer = tokenizers.from_directory(source.path)
    if config.chat_template is not None:
        tokenizer.chat_template = config.chat_template
    tokenizers.check_vocab(tokenizer, source.config.vocab_size)
    return tokenizer


def load_params(
    config: EngineConfig, source: weights.ModelSource, model: Model, verbose: bool
) -> dict:
    if config.load_format == "dummy":
        return model.init_params(jax.random.key(config.seed & 0xFFFFFFFF))

    expected = flatten(model.shapes())

    def put(array: np.ndarray, path: str) -> Any:
        leaf = expected[path]
        if isinstance(leaf, QuantArray):
            return jax.device_put(quantise(array, leaf, path))
        # An array in a mapped file would change with the file, if a CPU took it over as it is.
        return jax.device_put(memory.owned(array))

    return weights.load(source, model, put, progress=verbose)
