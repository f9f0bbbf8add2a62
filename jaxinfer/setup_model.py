"""What a model, or a draft model, gets from an EngineConfig: dtype, kernels, tokenizer, weights."""

import logging
from dataclasses import replace
from typing import Any, NoReturn

import jax

from jaxinfer import tokenizer as tokenizers
from jaxinfer import weights
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.errors import ConfigError
from jaxinfer.models import Model
from jaxinfer.models.balance import Balancer
from jaxinfer.params import flatten
from jaxinfer.quant import kept, schemes
from jaxinfer.quant.arrays import QuantArray
from jaxinfer.quant.rounding import quantise
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.weights import memory
from pallas_kernels import dispatch

logger = logging.getLogger(__name__)


def open_source(config: EngineConfig) -> weights.ModelSource:
    """The model that `config` names, open and checked; with dummy weights it needs none."""
    return weights.open_model(
        config.model,
        hf_overrides=config.hf_overrides,
        revision=config.revision,
        weights=config.load_format != "dummy",
    )


def choose_dtype(config: EngineConfig, model_config: ModelConfig, platform: str) -> str:
    """Of weights and activations: float32 on a CPU, elsewhere the checkpoint's, unless given."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if platform == "cpu" else model_config.dtype


def page_dtype(config: EngineConfig, dtype: str) -> str:
    """What pages hold under `config.kv_cache_dtype`, by jax's name; `dtype` is the model's."""
    return {"auto": dtype, "int8": "int8"}.get(config.kv_cache_dtype, "float8_e4m3fn")


def resolve_ops(
    config: EngineConfig, model_config: ModelConfig, dtype: str, platform: str
) -> dispatch.Ops:
    """The operations for this model and device. Raises ConfigError where those asked for cannot
    serve it."""
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


def quantization_of(config: EngineConfig, source: weights.ModelSource) -> str | None:
    """What `config.quantization` and `dequantize` come to with this checkpoint; None: float.

    ConfigError where they contradict each other or the checkpoint.
    """
    asked, fmt = config.quantization, source.quantised
    if config.dequantize and asked is not None:
        _refuse(f"dequantize=True contradicts quantization={asked!r}; leave one of them out")
    if fmt is None:
        is_gguf = source.kind == "gguf"
        if config.dequantize and not is_gguf:
            _refuse(f"dequantize=True has no meaning: the weights of {source.path} are float")
        if asked not in (None, "gguf" if is_gguf else None, *schemes.SCHEMES):
            stored = "is a GGUF file" if is_gguf else "has float weights"
            names = ", ".join((*(["gguf"] * is_gguf), *schemes.SCHEMES))
            _refuse(
                f"quantization={asked!r} is not how {source.path} is stored: it {stored}; leave "
                f"quantization out, or use one of {names}"
            )
    elif asked not in (None, fmt.method):
        _refuse(
            f"quantization={asked!r} would round weights a second time that {source.path} has as "
            f"{fmt.describe()}; leave quantization out, or name the float checkpoint"
        )
    if config.dequantize or (fmt is None and asked is None):
        return None
    if fmt is None and asked != "gguf":
        return asked
    if config.load_format == "dummy":
        if asked is not None:
            _refuse(f"quantization={asked!r} needs weights; load_format='dummy' makes float ones")
        return None
    for name, unset in (("quantization_group_size", None), ("quantize_lm_head", False)):
        if getattr(config, name) != unset:
            _refuse(f"{name} has no meaning where weights are kept as {source.path} has them", name)
    return "gguf" if fmt is None else fmt.method


def _is_kept(name: str | None, source: weights.ModelSource) -> bool:
    return name is not None and (source.quantised is not None or name == "gguf")


def quantised(config: EngineConfig, model: Model, source: weights.ModelSource) -> Model:
    """The model with the weights quantised that config and checkpoint say.

    ConfigError for what cannot be; matrices of a quantised checkpoint that cannot be kept so are
    warned of, and an error if `config.quantization` asks for them.
    """
    name = quantization_of(config, source)
    if name is None:
        return model
    if not _is_kept(name, source):
        formats = schemes.choose(
            name,
            model.rules,
            model.config,
            group_size=config.quantization_group_size,
            head=config.quantize_lm_head,
        )
        return replace(model, formats=formats)
    if source.packed is None:
        raise AssertionError(f"{source.path} is quantised, and its reader tells nothing of it")
    plan = kept.plan(source.packed, model.rules, model.config)
    for reason, names in plan.refused.items():
        text = (
            f"{source.path}: {len(names)} quantised matrices ({names[0]}, ...) cannot be kept as "
            f"they are stored: {reason}"
        )
        if config.quantization is not None:
            _refuse(f"{text}; leave out quantization={name!r} to have them de-quantised")
        logger.warning("%s; they are de-quantised to %s", text, model.dtype)
    return replace(model, formats=plan.formats)


def describe_weights(config: EngineConfig, source: weights.ModelSource, model: Model) -> str:
    """Which weights are quantised, and how; `config` has its quantization decided."""
    name, fmt = config.quantization, source.quantised
    parts = (model.formats, model.rules, model.config, model.dtype)
    if not _is_kept(name, source):
        return schemes.describe(str(name), *parts)
    if fmt is None:
        return kept.describe("quantisation: GGUF blocks, kept as stored", *parts)
    heading = f"quantisation: {fmt.describe()}, kept as stored"
    quantises = any(leaf.format.activations != "float" for leaf in _quant_arrays(model))
    if fmt.activations is not None and not quantises:
        heading += f"; activations are {model.dtype}, not {fmt.activations.describe()}"
    return kept.describe(heading, *parts)


def _quant_arrays(model: Model) -> list[QuantArray]:
    return [leaf for leaf in flatten(model.shapes()).values() if isinstance(leaf, QuantArray)]


def _refuse(message: str, field: str = "quantization") -> NoReturn:
    raise ConfigError(message, field=field)


def open_tokenizer(config: EngineConfig, source: weights.ModelSource) -> Tokenizer | None:
    """The tokenizer given or the model's own. Raises TokenizerError where it cannot be read or has
    ids that the model has not."""
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
    """The weights on the device, quantised as `model` says; random ones for load_format "dummy"."""
    if config.load_format == "dummy":
        return model.init_params(jax.random.key(config.seed & 0xFFFFFFFF))

    expected = flatten(model.shapes())

    def put(array: Any, path: str) -> Any:
        leaf = expected[path]
        if isinstance(array, QuantArray):  # as the checkpoint stores it
            return jax.device_put(array)
        if isinstance(leaf, QuantArray):
            return jax.device_put(quantise(array, leaf, path))
        # An array in a mapped file would change with the file, if a CPU took it over as it is.
        return jax.device_put(memory.owned(array))

    if not schemes.is_balanced(config.quantization):
        return weights.load(source, model, put, progress=verbose)
    balancer = Balancer(model, put)
    weights.load(source, model, balancer.put, progress=verbose)
    return balancer.params()
