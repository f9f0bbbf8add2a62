"""The calibration text as token ids, and the statistics of what a layer's matrices see of it.

One decoder layer at a time is run, by the model's own code: its matrices are passed as QuantArrays
whose matmul notes the inputs, and its pages are replaced by attention over whole sequences.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.errors import ConfigError
from jaxinfer.models import Model
from jaxinfer.models.layers import Decoder, rotation
from jaxinfer.params import Rule, unflatten
from jaxinfer.quant.arrays import QuantArray
from jaxinfer.quantize.settings import INPUTS, Settings
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.weights.memory import owned

_TOKENS = 4096
"""Most tokens that go through a layer at once."""

Params = dict[str, Any]


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class Seen:
    """Sums over the tokens of one matrix's inputs X: `hessian` X'X [K, K], `magnitudes` |X| [K]."""

    hessian: jax.Array
    magnitudes: jax.Array


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class Statistics:
    """By the first leaf of a tuple of INPUTS what it sees; and the largest |k| and |v| written."""

    inputs: dict[str, Seen]
    largest_k: jax.Array
    largest_v: jax.Array

    def check_finite(self, layer: int) -> None:
        """ConfigError where the calibration text gives NaN or infinity."""
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(self)):
            raise ConfigError(
                f"layer {layer} is given NaN or infinity by the calibration text: the model's "
                "weights are damaged, or overflow float32",
                field="calibration",
            )


def read_sequences(path: Path | None, tokenizer: Tokenizer, settings: Settings) -> np.ndarray:
    """Token ids int32 [num_sequences, sequence_length], evenly spread over the text.

    Raises ConfigError: no file, not UTF-8, too short.
    """
    if path is None:
        raise ConfigError(
            f"method {settings.method} needs a calibration text, and none is bundled; pass a UTF-8 "
            "text like what the model will be used for (calibration=, --calibration)",
            field="calibration",
        )
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"calibration {path} cannot be read: {error}", field="calibration") from (
            error
        )
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"calibration {path} is not UTF-8 text (byte {error.start}); convert it",
            field="calibration",
        ) from error
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
    length, wanted = settings.sequence_length, settings.num_sequences
    there = len(ids) // length
    if there < wanted:
        raise ConfigError(
            f"calibration {path} has {len(ids)} tokens, {there} sequences of {length}; {wanted} "
            f"are asked for: give a longer text, or fewer or shorter sequences",
            field="calibration",
        )
    chosen = np.arange(wanted) * there // wanted
    return ids[: there * length].reshape(there, length)[chosen]


class Layers:
    """The model's layers as functions of their weights, jitted once for all that are alike."""

    def __init__(self, model: Model):
        self.model = model
        self._programs: dict[tuple[Any, ...], Any] = {}

    def embed(self, shared: Params, tokens: np.ndarray) -> np.ndarray:
        """tokens int32 [B, S] -> hidden float32 [B, S, D]; `shared` has the tables."""

        def program(shared: Params, tokens: jax.Array) -> jax.Array:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape).reshape(-1)
            flat: Any = self.model.module.apply(
                {"params": shared}, tokens.reshape(-1), positions, method=Decoder.embed
            )
            return flat.reshape(*tokens.shape, -1)

        run = jax.jit(program)
        shared = jax.device_put(shared)
        return np.concatenate([run(shared, some) for some in _batches(tokens)])

    def params(self, layer: int, rules: list[Rule], tensors: dict[str, np.ndarray]) -> Params:
        """What `run` takes, on the device, from tensors by rule name in Hugging Face's layout."""
        leaves = {}
        for rule in rules:
            leaf = rule.path.removeprefix(f"layers_{layer}/")
            array = tensors[rule.name].astype(np.float32)
            if rule.contracted:
                leaves[leaf] = QuantArray(
                    data=owned(array),
                    scales=None,
                    zeros=None,
                    format=leaf,  # pyright: ignore[reportArgumentType]: names the matrix
                    shape=rule.shape(self.model.config),
                    contracted=rule.contracted,
                )
            else:
                leaves[leaf] = owned(rule.transform(array, self.model.config))
        return jax.device_put(unflatten(leaves))

    def run(
        self, layer: int, params: Params, hidden: np.ndarray, *, record: bool
    ) -> tuple[np.ndarray, Statistics | None]:
        """hidden [B, S, D] before and after the layer; with `record` what its matrices saw."""
        like = self.model.config.windows.index(self.model.config.windows[layer])
        key = (like, record)
        if key not in self._programs:
            self._programs[key] = jax.jit(partial(_layer, self.model, like, record))
        program = self._programs[key]
        after = np.empty_like(hidden)
        statistics, start = None, 0
        for some in _batches(hidden):
            out, seen = program(params, some)
            after[start : start + len(some)] = out
            start += len(some)
            statistics = seen if statistics is None else _add(statistics, seen)
        if statistics is not None:
            statistics.check_finite(layer)
        return after, statistics


def _batches(array: np.ndarray) -> list[np.ndarray]:
    """array [B, S, ...] in parts of whole sequences."""
    step = max(1, _TOKENS // array.shape[1])
    return [array[start : start + step] for start in range(0, len(array), step)]


@partial(jax.jit, donate_argnums=0)
def _add(total: Statistics, more: Statistics) -> Statistics:
    return Statistics(
        jax.tree.map(jnp.add, total.inputs, more.inputs),
        jnp.maximum(total.largest_k, more.largest_k),
        jnp.maximum(total.largest_v, more.largest_v),
    )


def _layer(
    model: Model, layer: int, record: bool, params: Params, hidden: jax.Array
) -> tuple[jax.Array, Statistics | None]:
    """hidden [B, S, D] after one layer, every row of the batch a sequence from position 0."""
    batch, length, width = hidden.shape
    inputs: dict[str, jax.Array] = {}

    def quant_matmul(x: jax.Array, data: jax.Array, *rest: Any, format: Any) -> jax.Array:
        del rest
        inputs[format] = x
        return jnp.einsum("tk,nk->tn", x, data, preferred_element_type=jnp.float32)

    def keep(pages: Any, k: jax.Array, v: jax.Array, slots: Any) -> tuple[jax.Array, jax.Array]:
        del pages, slots
        return k, v

    def attend(q: jax.Array, pages: Any, ragged: Any, **options: Any) -> jax.Array:
        del ragged
        whole = [x.reshape(batch, length, *x.shape[1:]) for x in (q, *pages)]
        return model.ops.flash_attention(*whole, **options).reshape(q.shape)

    ops = replace(model.ops, quant_matmul=quant_matmul, kv_write=keep, paged_attention=attend)
    decoder: Any = model.module
    block = decoder.block(model.config, ops, model.dtype, layer, parent=None, name="layers")
    rope = decoder.rope_of(layer)
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length)).reshape(-1)
    table = None if rope is None else rotation(rope, model.config.head_dim, positions)
    rows = hidden.reshape(-1, width)
    # what only pages need is None
    ragged = SimpleNamespace(slots=None)
    out, (k, v) = block.apply({"params": params}, rows, None, table, ragged)
    out = out.reshape(hidden.shape)
    if not record:
        return out, None
    seen = {
        leaves[0]: Seen(x.T @ x, jnp.abs(x).sum(axis=0))
        for leaves in INPUTS
        for x in (inputs[leaves[0]],)
    }
    return out, Statistics(seen, jnp.abs(k).max(), jnp.abs(v).max())
