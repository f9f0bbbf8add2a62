"""Others' attention on a GPU, timed as ours is: cuDNN, torch, and the kernels that JAX ships.

Each is tried where it is installed; what it raises becomes the note of its row.
"""

import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import device_time

MGPU = "jax.experimental.pallas.ops.gpu.attention_mgpu"
TRITON_PAGED = "jax.experimental.pallas.ops.gpu.paged_attention"


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
    """cuDNN's flash attention, through jax.nn."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")


def flash_peers(section: str, head_dim: int) -> Iterator[tuple[str, Callable[[Any, float], float]]]:
    """(name, seconds of one call for (q, k, v, dout) and a guess of it)."""
    if section == "prefill":
        yield "jax mgpu f16", mosaic_gpu
        yield "torch sdpa", torch_forward
    else:
        yield "torch sdpa", torch_backward


def mosaic_gpu(args: Any, guess: float) -> float:
    """JAX's Mosaic GPU attention, which takes float16 alone."""
    module = import_module(MGPU)
    q, k, v = (x.astype(jnp.float16) for x in args[:3])
    block_kv = 64 if q.shape[-1] == 256 else 128
    config = module.TuningConfig(block_q=64, block_kv=block_kv, max_concurrent_steps=2, causal=True)
    step = lambda q, kv, i: module.attention(q, *kv, config)  # noqa: E731
    return device_time.seconds_per_call(step, q, (k, v), guess)


def torch_forward(args: Any, guess: float) -> float:
    return _torch(args, False)


def torch_backward(args: Any, guess: float) -> float:
    return _torch(args, True)


def _torch(args: Any, is_backward: bool) -> float:
    """torch's scaled_dot_product_attention, forward or backward, by CUDA events."""
    torch = import_module("torch")
    shapes = [(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in args]
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    q, k, v, dout = (torch.randn(shape, **options) for shape in shapes)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    for x in (q, k, v):
        x.requires_grad_(is_backward)

    def forward() -> Any:
        return sdpa(q, k, v, is_causal=True, enable_gqa=True)

    out = forward()

    def backward() -> Any:
        return torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    work, count = backward if is_backward else forward, 20
    for _ in range(3):
        work()
    times = []
    for _ in range(5):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        for _ in range(count):
            work()
        ended.record()
        torch.cuda.synchronize()
        times.append(begun.elapsed_time(ended) / 1e3 / count)
    return float(np.median(times))


def triton_paged(
    batch: int,
    context: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    guess: float,
) -> float:
    """JAX's paged attention in Triton, over its own head-major pools."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = import_module(TRITON_PAGED)
    width = context // page_size
    shape = (2, num_kv_heads, batch * width, page_size, head_dim)
    k, v = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    ids = np.random.default_rng(0).permutation(batch * width).reshape(batch, width)
    table, lens = jnp.asarray(ids, jnp.int32), jnp.full(batch, context, jnp.int32)
    q = jax.random.normal(jax.random.key(1), (batch, num_heads, head_dim), jnp.bfloat16)

    def step(q: jax.Array, fixed: Any, i: jax.Array) -> jax.Array:
        return module.paged_attention(q, *fixed)

    return device_time.seconds_per_call(step, q, (k, v, table, lens), guess)
