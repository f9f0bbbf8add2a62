"""Balancing, for int8 activations: large channels of what a norm gives are made smaller, and the
columns of the matrices that read them larger by as much: the float model stays the same.

One scale for a row is set by the row's largest channel, and some channels of a norm's output are 20
to 60 times the others. The factors are SmoothQuant's (arXiv:2211.10438), of which sqrt(rms of the
channel / rms of its columns) makes the product of both errors least. The rms of
the channels is taken over pseudo-random tokens: which channels are large is the model's doing, not
the text's. While weights are loaded, each layer is kept until it is whole, run over the tokens in
float32, balanced and passed on; nothing else of the float model is ever in memory.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.models.layers import observed, rotation
from jaxinfer.models.model import Model, Params
from jaxinfer.params import flatten, unflatten
from pallas_kernels.dispatch import resolve
from pallas_kernels.paged_attention import Ragged

NUM_TOKENS = 128
READERS = {"attn_norm": ("attn/q", "attn/k", "attn/v"), "mlp_norm": ("mlp/gate", "mlp/up")}
"""The norms of every block here, and all that reads each; the last axis of a reader is the
norm's."""
MAX_FACTOR = 256.0
_PAGE_SIZE = 16


class Balancer:
    """Between the loader and `put`: takes leaves as the loader gives them, in the order of the
    rules (embedding first, then layer by layer), and passes them on balanced."""

    def __init__(self, model: Model, put: Callable[[np.ndarray, str], Any]):
        self._config = model.config
        self._put = put
        ops = resolve("xla", model.ops.platform)
        self._module: Any = model.module.clone(ops=ops, dtype="float32")
        self._expected = set(flatten(model.shapes()))
        self._leaves: dict[str, Any] = {}
        self._tables: dict[str, jax.Array] = {}
        self._hidden: jax.Array | None = None
        self._layer: dict[str, np.ndarray] = {}
        self._num_done = 0
        config = model.config
        random = np.random.RandomState(0)
        self._tokens = random.randint(0, config.vocab_size, min(NUM_TOKENS, config.max_position))

    def put(self, array: np.ndarray, path: str) -> None:
        """Take one leaf; those of a layer are passed on when all of them are there."""
        if not path.startswith("layers_"):
            if path in ("embed", "positions"):
                rows = self._tokens if path == "embed" else np.arange(len(self._tokens))
                self._tables[path] = jnp.asarray(array[rows].astype(np.float32))
            self._leaves[path] = self._put(array, path)
            return
        self._layer[path] = array
        prefix = f"layers_{self._num_done}/"
        if self._layer.keys() >= {p for p in self._expected if p.startswith(prefix)}:
            layer = {p: a for p, a in self._layer.items() if p.startswith(prefix)}
            for p in layer:
                del self._layer[p]
            with np.errstate(over="ignore", invalid="ignore"):  # `put` refuses what overflows
                layer = balance(layer, prefix, self._run(layer, prefix))
            for p, balanced in layer.items():
                self._leaves[p] = self._put(balanced, p)
            self._num_done += 1

    def params(self) -> Params:
        """The parameter tree, once every leaf was given."""
        if self._leaves.keys() != self._expected:
            raise AssertionError(f"never put: {sorted(self._expected - self._leaves.keys())}")
        return unflatten(self._leaves)

    def _run(self, layer: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
        """The layer over the tokens; the rms of each channel of what its norms give, [D]."""
        config, module = self._config, self._module
        count = len(self._tokens)
        positions = jnp.arange(count, dtype=jnp.int32)
        if self._hidden is None:
            self._hidden = module.apply(
                {"params": self._tables}, positions, positions, method="embed"
            )
        block = module.block(config, module.ops, "float32", self._num_done, parent=None)
        weights = unflatten(
            {p.removeprefix(prefix): jnp.asarray(a.astype(np.float32)) for p, a in layer.items()}
        )
        rope = module.rope_of(self._num_done)
        table = None if rope is None else rotation(rope, config.head_dim, positions)
        num_pages = -(-count // _PAGE_SIZE)
        pages = module.ops.allocate(
            num_pages + 1, _PAGE_SIZE, config.num_kv_heads, config.head_dim, "float32"
        )
        ragged = Ragged(
            page_table=jnp.arange(1, num_pages + 1, dtype=jnp.int32)[None],
            kv_lens=jnp.asarray([count], jnp.int32),
            cu_q_lens=jnp.asarray([0, count], jnp.int32),
            num_decode=jnp.asarray(0, jnp.int32),
            slots=positions + _PAGE_SIZE,
            decode_only=False,
        )
        self._hidden, normed = observed(block, weights, self._hidden, pages, table, ragged)
        return {
            name: np.sqrt(np.mean(np.square(np.asarray(x)), axis=0)) for name, x in normed.items()
        }


def balance(
    layer: dict[str, np.ndarray], prefix: str, rms: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The leaves of a layer, its norms divided, their readers' columns multiplied by `factors`."""
    changed = dict(layer)
    for norm, names in READERS.items():
        readers = [prefix + name for name in names if prefix + name in layer]
        matrices = [layer[p].astype(np.float32) for p in readers]
        scales = factors(rms[norm], matrices)
        for path, matrix in zip(readers, matrices, strict=True):
            changed[path] = matrix * scales
        for part in ("scale", "bias"):
            path = f"{prefix}{norm}/{part}"
            if path in layer:
                changed[path] = layer[path] / scales
    return changed


def factors(rms: np.ndarray, matrices: list[np.ndarray]) -> np.ndarray:
    """Float32 [D], around 1, for inputs of magnitude `rms` [D] of matrices [..., D]; 1 for an input
    that is always zero, or that nothing reads."""
    squares = sum(np.mean(np.square(m.reshape(-1, len(rms))), axis=0) for m in matrices)
    with np.errstate(divide="ignore"):
        logs = (np.log(rms) - np.log(squares) / 2) / 2
    used = np.isfinite(logs)
    if not used.any():
        return np.ones_like(rms)
    scales = np.exp(np.where(used, logs - np.median(logs[used]), 0))
    return np.clip(scales, 1 / MAX_FACTOR, MAX_FACTOR).astype(np.float32)
