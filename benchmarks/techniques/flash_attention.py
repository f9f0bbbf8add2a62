"""Flash attention: scores are made block by block and never written to memory as a whole."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import BenchmarkError
from benchmarks.techniques.bench import (
    Bench,
    Counted,
    Literature,
    Technique,
    make_row,
    seconds,
)
from pallas_kernels import resolve
from pallas_kernels.flash_attention import xla

HEAD_DIM = 64
LITERATURE_BLOCK = 128
LITERATURE = Literature(
    "N = 4,000: 64 M elements moved without, about 17 M with: 3.8x; exact to rounding",
    "arithmetic, heads of 64: 4 N^2 against 2 N d + 2 N d ceil(N / 128), K and V read once per "
    "block of 128 queries; FlashAttention, arXiv 2205.14135",
    (3.8, 3.8),
)


def moved_without(length: int, heads: int, kv_heads: int) -> int:
    """Elements: scores and probabilities are each written and read; q, k, v read, out written."""
    return 4 * heads * length**2 + 2 * (heads + kv_heads) * length * HEAD_DIM


def moved_with(
    length: int, heads: int, kv_heads: int, block_q: int, block_kv: int, causal: bool
) -> int:
    """Elements: q read and out written once, k and v once per block of queries that sees them."""
    keys = 0
    for begin in range(0, length, block_q):
        last = min(begin + block_q, length) if causal else length
        keys += min(-(-last // block_kv) * block_kv, length)
    return 2 * heads * length * HEAD_DIM + 2 * kv_heads * keys * HEAD_DIM


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> np.ndarray:
    """[S, N, H] in float64, a block of queries at a time."""
    length, heads, width = q.shape
    group = heads // k.shape[1]
    out = np.empty(q.shape)
    for begin in range(0, length, 500):
        end = min(begin + 500, length)
        for n in range(heads):
            scores = q[begin:end, n].astype(np.float64) @ k[:, n // group].astype(np.float64).T
            scores *= width**-0.5
            if causal:
                seen = np.arange(length) <= np.arange(begin, end)[:, None]
                scores = np.where(seen, scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[begin:end, n] = weights @ v[:, n // group].astype(np.float64)
    return out


def compiled(impl: str, q: Any, k: Any, v: Any, causal: bool) -> tuple[Callable, int, str]:
    """The program, the bytes the compiler sets aside for what is between in and out, its name."""
    ops = resolve(impl)
    attend = jax.jit(partial(ops.flash_attention, causal=causal))
    program = attend.lower(q, k, v).compile()
    report = program.memory_analysis()
    if report is None:
        raise BenchmarkError(f"the compiler of {ops.platform} reports no memory; use --only others")
    return program, report.temp_size_in_bytes, ops.name


def measure_case(bench: Bench, name: str, heads: int, causal: bool) -> dict[str, Any]:
    length = bench.size(4000, 1000)
    rng = np.random.default_rng(heads)
    arrays = [rng.standard_normal((1, length, n, HEAD_DIM), np.float32) for n in (heads, 1, 1)]
    q, k, v = (jnp.asarray(a) for a in arrays)
    without, bytes_off, _ = compiled("reference", q, k, v, causal)
    with_, bytes_on, impl = compiled("auto", q, k, v, causal)
    measured = bench.compare(
        f"flash-attention-{name}",
        "time_s",
        lambda i: seconds(lambda: jax.block_until_ready(without(q, k, v))),
        lambda i: seconds(lambda: jax.block_until_ready(with_(q, k, v))),
        repeats=max(bench.repeats, 5),
    )
    wanted = exact(arrays[0][0], arrays[1][0], arrays[2][0], causal)
    errors = [float(np.abs(np.asarray(f(q, k, v))[0] - wanted).max()) for f in (without, with_)]
    blocks = xla.default_config(heads, length, length) if impl == "xla" else None
    block_q, block_kv = (blocks.block_q, blocks.block_kv) if blocks else (LITERATURE_BLOCK,) * 2
    off = moved_without(length, heads, 1)
    on = moved_with(length, heads, 1, block_q, block_kv, causal)
    title = "causal" if causal else "not causal"
    return make_row(
        f"Flash attention, {title}",
        f"N = {length:,}, {heads} query head(s) on 1 KV head of {HEAD_DIM}",
        off_is="all scores at once (the reference implementation)",
        literature=LITERATURE,
        counted=Counted(
            f"elements moved, blocks of {block_q} queries: {off / 1e6:.1f} M -> {on / 1e6:.1f} M; "
            f"compiler's temporaries: {bytes_off / 2**20:.0f} MiB -> {bytes_on / 2**20:.1f} MiB",
            off,
            on,
        ),
        measured=measured,
        implementation=impl,
        temporary_bytes_off=bytes_off,
        temporary_bytes_on=bytes_on,
        max_error_off=errors[0],
        max_error_on=errors[1],
        target="max error against float64 under 1e-5",
        target_met=errors[1] < 1e-5,
    )


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    yield measure_case(bench, "full", heads=1, causal=False)
    yield measure_case(bench, "causal", heads=3, causal=True)


TECHNIQUE = Technique(
    "flash-attention", "elements moved, compiler's memory, time and error at N = 4,000", measure
)
