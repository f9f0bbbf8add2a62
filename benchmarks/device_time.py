"""How long work takes on the device, by calls chained in one jit; what it reaches in copies and
products.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


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
