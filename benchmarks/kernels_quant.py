"""The rows of `benchmarks.kernels quant` on an accelerator: products with quantised weights of
Llama-3.1-8B beside the bytes that they must read, XLA's form and the bfloat16 weight.

Each call reads weights that are not in the cache: as many copies of one as take COPY_BYTES.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from benchmarks import device_time
from pallas_kernels import Format, aot_quant

Row = dict[str, Any]
Weight = tuple[Any, ...]

FORMATS = aot_quant.FORMATS
WEIGHTS = ("gate and up", "down")
ROWS = (1, 8, 64, 256, 2048)
COPY_BYTES = 120 << 20  # twice the cache of an H200
CHECKED = (1024, 2048)  # N, K that are compared with the reference


def quant(
    deadline: float,
    at: dict[str, float],
    timed: Callable[..., Row],
    difference: Callable[..., Row],
) -> Iterator[Row]:
    """Differences to the reference, then the times."""
    ops = pallas_kernels.resolve("auto")
    for label, format in FORMATS.items():
        yield _checked(label, format, ops, difference)
    peers = {ops.name: ops.quant_matmul, "xla": pallas_kernels.resolve("xla").quant_matmul}
    for name in WEIGHTS:
        n, k = aot_quant.WEIGHTS[name]
        for label, format in (*FORMATS.items(), ("bfloat16", None)):
            weights = copies_of(format, n, k)
            moved = sum(x.nbytes for x in weights[0] if x is not None)
            ways = peers if format else {"dense": _dense}
            for rows in ROWS:
                for impl, op in ways.items():
                    case = f"{rows} rows, {name} {n} x {k} {label}"
                    if time.monotonic() > deadline:
                        yield {"left_out": f"quant {case} {impl}"}
                        continue
                    row = {"section": "quant", "case": case, "impl": impl}
                    call = partial(op, format=format) if format else op
                    work = partial(_seconds, call, rows, k, weights)
                    result = 4 * rows * n + 2 * rows * k
                    yield timed(row, work, 2 * rows * n * k, moved + result, at)


def weight_of(key: jax.Array, format: Format | None, n: int, k: int) -> Weight:
    """Random arrays of a weight [n, k]; bfloat16 where there is no format."""
    keys = jax.random.split(key, 3)
    if format is None:
        return (jax.random.normal(keys[0], (n, k), jnp.bfloat16),)
    shapes: dict[str, Any] = format.shapes(n, k)
    stored, grouped, points = shapes["data"], shapes["scales"], shapes["zeros"]
    bits = jax.random.bits(keys[0], stored.shape, jnp.uint8)
    data = jax.lax.bitcast_convert_type(bits, jnp.int8)
    if format.dtype == "float8_e4m3fn":
        data = jax.random.normal(keys[0], stored.shape, jnp.bfloat16).astype(stored.dtype)
    elif format.dtype == "int4":
        data = bits
    scales = jax.random.uniform(keys[1], grouped.shape, jnp.float32, 1e-3, 1e-2)
    zeros = None
    if points is not None:
        zeros = jax.random.randint(keys[2], points.shape, -8, 8, jnp.int8)
    return data, scales, zeros


def copies_of(format: Format | None, n: int, k: int) -> list[Weight]:
    """Different weights of one shape, COPY_BYTES of them or one."""
    make = jax.jit(weight_of, static_argnums=(1, 2, 3))
    first = make(jax.random.key(0), format, n, k)
    count = -(-COPY_BYTES // first[0].nbytes)
    return [first, *(make(jax.random.key(i), format, n, k) for i in range(1, count))]


def _dense(x: jax.Array, w: jax.Array) -> jax.Array:
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)


def _seconds(op: Any, rows: int, k: int, weights: list[Weight], guess: float) -> float:
    """Device time of one product."""
    x = jax.random.normal(jax.random.key(1), (rows, k), jnp.bfloat16)

    def step(x: jax.Array, weights: list[Weight], i: jax.Array) -> list[jax.Array]:
        return [op(x, *weight) for weight in weights]

    count = len(weights)
    return device_time.seconds_per_call(step, x, weights, guess * count) / count


def _checked(label: str, format: Format, ops: Any, difference: Callable[..., Row]) -> Row:
    """The largest difference to the reference, over the largest result."""
    n, k = CHECKED
    weight = weight_of(jax.random.key(2), format, n, k)
    x = jax.random.normal(jax.random.key(3), (40, k), jnp.bfloat16)
    plain = jax.jit(partial(pallas_kernels.resolve("reference").quant_matmul, format=format))
    largest = float(np.abs(np.asarray(plain(x, *weight))).max())

    def relative(op: Any) -> Callable[..., Any]:
        return jax.jit(lambda *args: op(*args, format=format) / largest)

    row = {"section": "quant", "case": f"check {label}", "impl": ops.name}
    both = (ops.quant_matmul, pallas_kernels.resolve("reference").quant_matmul)
    return difference(row, *map(relative, both), x, *weight)
