"""What kernels and whole models must at least do and move, what a chip allows, and how long calls
take on the device.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

BACKWARD = 2.5  # products of the backward pass, in forwards: dq, dk, dv, and P and dP again


def attention_flops(num_heads: int, head_dim: int, q_lens: list[int], kv_lens: list[int]) -> int:
    """Of causal attention, forward: two products over every visible pair, for rows whose queries
    are the last positions of their keys."""
    pairs = sum(q * kv - q * (q - 1) // 2 for q, kv in zip(q_lens, kv_lens, strict=True))
    return 4 * num_heads * head_dim * pairs


def page_bytes_read(num_kv_heads: int, head_dim: int, page_dtype: str, positions: int) -> int:
    """K and V of `positions`, each read once, with the scales of quantised pages."""
    item = jnp.dtype(page_dtype).itemsize
    return positions * 2 * num_kv_heads * (head_dim * item + (4 if item == 1 else 0))


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes of memory and bfloat16 FLOPs per second that something allows."""

    bytes_s: float
    flops: float


# What makers state, dense: jax's name of the chip -> memory bandwidth and bfloat16 matrix rate.
NOMINAL = {
    "NVIDIA H200": Limits(4.8e12, 989e12),
    "NVIDIA H100 80GB HBM3": Limits(3.35e12, 989e12),
    "NVIDIA A100-SXM4-80GB": Limits(2.04e12, 312e12),
    "TPU v5 lite": Limits(0.81e12, 197e12),
    "TPU v5": Limits(2.8e12, 459e12),
    "TPU v6 lite": Limits(1.6e12, 918e12),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """Least bytes moved and floating-point operations of a piece of work. `serial_bytes` are those
    of attention, which no matrix product hides."""

    weight_bytes: float
    serial_bytes: float
    matmul_flops: float
    attention_flops: float

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.serial_bytes

    @property
    def flops(self) -> float:
        return self.matmul_flops + self.attention_flops

    def seconds(self, limits: Limits) -> float:
        """Weights are streamed while products are made; attention's bytes come on top."""
        products = max(self.weight_bytes / limits.bytes_s, self.matmul_flops / limits.flops)
        return products + max(
            self.serial_bytes / limits.bytes_s, self.attention_flops / limits.flops
        )


@dataclass(frozen=True, slots=True)
class Decoder:
    """What a decoder-only model's cost depends on. The embedding is gathered, not streamed."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    mlp: int
    vocab: int
    weight_bytes: int = 2
    kv_bytes: int = 2

    @classmethod
    def of(cls, config: Mapping[str, Any], dtype: str) -> "Decoder":
        """From a Hugging Face config.json of a Llama and the dtype of weights and pages."""
        heads = config["num_attention_heads"]
        item = jnp.dtype(dtype).itemsize
        return cls(
            config["num_hidden_layers"],
            heads,
            config["num_key_value_heads"],
            config.get("head_dim") or config["hidden_size"] // heads,
            config["hidden_size"],
            config["intermediate_size"],
            config["vocab_size"],
            item,
            item,
        )

    @property
    def block_weights(self) -> int:
        """Of all layers' matrices."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.num_layers * self.hidden * (attention + 3 * self.mlp)

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocab

    @property
    def bytes_per_token(self) -> int:
        """Of K and V in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_bytes

    def decode(self, batch: float, context: float) -> Cost:
        """One step of `batch` rows that each see `context` positions."""
        weights = self.block_weights + self.head_weights
        pairs = batch * context
        return Cost(
            weights * self.weight_bytes,
            pairs * self.bytes_per_token,
            2 * batch * weights,
            4 * self.num_layers * self.num_heads * self.head_dim * pairs,
        )

    def prefill(self, rows: int, tokens: int) -> Cost:
        """`rows` prompts of `tokens`, causal, of which the last token's logits are wanted."""
        pairs = rows * tokens * tokens / 2
        return Cost(
            (self.block_weights + self.head_weights) * self.weight_bytes,
            rows * tokens * self.bytes_per_token,
            2 * rows * (tokens * self.block_weights + self.head_weights),
            4 * self.num_layers * self.num_heads * self.head_dim * pairs,
        )


def shares(cost: Cost, seconds: float, limits: Limits | None, name: str) -> dict[str, float | None]:
    """{"mbu_NAME", "mfu_NAME", "roofline_share_NAME"}: shares of what `limits` allow that work of
    `cost` reached in `seconds`; None where the limits are not known."""
    keys = (f"mbu_{name}", f"mfu_{name}", f"roofline_share_{name}")
    if limits is None:
        return dict.fromkeys(keys)
    reached = (
        cost.bytes / seconds / limits.bytes_s,
        cost.flops / seconds / limits.flops,
        cost.seconds(limits) / seconds,
    )
    return {key: round(value, 4) for key, value in zip(keys, reached, strict=True)}


def seconds_per_call(
    step: Callable[..., Any],
    carry: Any,
    fixed: Any,
    guess: float,
    *,
    target: float = 0.05,
    repeats: int = 10,
) -> float:
    """Device time of `step(carry, fixed, i) -> result`: calls in one jit, each of which waits for
    the one before; the median of `repeats`, fewer when they take long.

    There are at least 20 calls, and as many as take `target` seconds if one takes `guess`: a number
    known before compiling, for a GPU asks the host after every turn of a loop without one.
    The barrier makes every call's carry depend on the last result, so that nothing is hoisted or
    overlapped, and costs nothing itself. The result is carried too: a barrier's unused operands
    are removed, and with them would be what computes them.
    """
    count = max(20, min(1000, math.ceil(target / guess)))

    def run(carry: Any, fixed: Any) -> Any:
        def body(i: jax.Array, state: Any) -> Any:
            return lax.optimization_barrier((state[0], step(state[0], fixed, i)))

        shapes = jax.eval_shape(step, carry, fixed, jnp.int32(0))
        first = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return lax.fori_loop(0, count, body, (carry, first))[1]

    jitted = jax.jit(run)
    jax.block_until_ready(jitted(carry, fixed))
    times = [_elapsed(jitted, carry, fixed)]
    if times[0] > 10 * target:
        repeats = min(repeats, 2)
    times += [_elapsed(jitted, carry, fixed) for _ in range(repeats - 1)]
    return statistics.median(times) / count


def _elapsed(run: Callable[..., Any], *args: Any) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - begun


def copy_bandwidth(num_bytes: int) -> float:
    """Bytes per second, read and written, of an elementwise pass over `num_bytes`."""
    x = jax.random.normal(jax.random.key(0), (num_bytes // 2048, 1024), jnp.bfloat16)

    def run(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 20, lambda _, x: lax.optimization_barrier(-x), x)

    jitted = jax.jit(run)
    jax.block_until_ready(jitted(x))
    best = min(_elapsed(jitted, x) for _ in range(5))
    return 20 * 2 * x.nbytes / best


def matmul_flops(size: int, dtype: Any = jnp.bfloat16) -> float:
    """FLOP/s of a chain of square products of random data, whose scale is kept."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.float32)
    a, b = a.astype(dtype), (b * size**-0.5).astype(dtype)
    # A chain: each product is the next one's operand.
    seconds = seconds_per_chain(lambda a: a @ b, a)
    return 2 * size**3 / seconds


def seconds_per_chain(step: Callable[[Any], Any], x: Any, count: int = 20) -> float:
    """Of x -> step(x) -> step(step(x)) ..., in one jit; the best of five."""
    jitted = jax.jit(lambda x: lax.fori_loop(0, count, lambda _, x: step(x), x))
    jax.block_until_ready(jitted(x))
    return min(_elapsed(jitted, x) for _ in range(5)) / count
