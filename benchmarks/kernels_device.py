"""The rows of `benchmarks.kernels` on an accelerator; see there.

A section is a generator of rows that ends before its deadline. Whatever cannot run, ours or
theirs, becomes a row with the reason in its note.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from benchmarks import device_time, kernels_peers, kernels_quant, roofline
from pallas_kernels import Ops, Ragged, Spec

Row = dict[str, Any]
Ceilings = dict[str, float]

# head dim -> N, K of a model that has it
HEADS = {128: (32, 8), 64: (32, 8), 256: (8, 4)}
LENGTHS = (4096, 8192, 16384)
BATCHES, CONTEXTS = (1, 8, 32, 128, 256), (512, 2048, 8192, 32768)
PEER_DECODE = ((32, 2048), (128, 2048))  # (batch, context)
POOL_PAGES = 8192  # of paged prefill
PAGE_SIZE = {"gpu": 64, "tpu": 128}
CHUNKS = {  # name -> (new tokens, length) of each row
    "4096 of 4096": [(4096, 4096)],
    "8 x 512 of 512": [(512, 512)] * 8,
    "2048 of 16384": [(2048, 16384)],
    "64 decode x 2048 + 1024 of 4096": [(1, 2048)] * 64 + [(1024, 4096)],
}
# Nothing of a call may still be in the cache from the one before: pools are many times as large.
POOL_BYTES = 2 << 30


def platform() -> str:
    return jax.devices()[0].platform


def ours(num_heads: int, num_kv_heads: int, head_dim: int, page_dtype: str = "bfloat16") -> Ops:
    """The fastest implementation for the device."""
    size = PAGE_SIZE[platform()]
    spec = Spec(num_heads, num_kv_heads, head_dim, size, "bfloat16", page_dtype)
    return pallas_kernels.resolve("auto", spec=spec)


def timed(
    row: Row, work: Callable[[float], float], flops: float, moved: float, at: Ceilings
) -> Row:
    """`row` with the time of `work`, what that achieves, and the roofline; or with what went wrong.
    `work` is told a guess of its time, which is twice the roofline."""
    roof = max(flops / at["matmul_flops"], moved / at["copy_bytes"])
    try:
        seconds = work(2 * roof)
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return row | {"note": f"cannot run: {why}", "roofline_us": roof * 1e6}
    bound_by_matmul = flops / at["matmul_flops"] >= moved / at["copy_bytes"]
    achieved = f"{flops / seconds / 1e12:.0f} TFLOP/s"
    if not bound_by_matmul:
        achieved = f"{moved / seconds / 1e9:.0f} GB/s"
    share = round(roof / seconds, 3)
    times = {"us": seconds * 1e6, "roofline_us": roof * 1e6, "share": share}
    return row | times | {"achieved": achieved, "seconds": seconds, "flops": flops, "bytes": moved}


def ceilings(deadline: float, _: Ceilings) -> Iterator[Row]:
    """Bytes per second of a copy and FLOP/s of a matmul, measured here and now."""
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 8 << 30)
    found = {
        "copy_bytes": device_time.copy_bandwidth(min(4 << 30, memory // 8)),
        "matmul_flops": device_time.matmul_flops(8192),
    }
    yield {"section": "ceilings", **found}


def check(deadline: float, at: Ceilings) -> Iterator[Row]:
    """Largest difference to the reference, before anything is timed."""
    for head_dim, (num_heads, num_kv_heads) in HEADS.items():
        keys = jax.random.split(jax.random.key(head_dim), 4)
        shapes = [(1, 1024, n, head_dim) for n in (num_heads, num_kv_heads, num_kv_heads)]
        q, k, v = (
            jax.random.normal(key, s, jnp.bfloat16) for key, s in zip(keys[:3], shapes, strict=True)
        )
        dout = jax.random.normal(keys[3], q.shape, jnp.bfloat16)
        ops = ours(num_heads, num_kv_heads, head_dim)
        plain = pallas_kernels.resolve("reference")

        def flash(ops: Ops, q: Any, k: Any, v: Any, dout: Any) -> Any:
            out, pull = jax.vjp(partial(ops.flash_attention, causal=True), q, k, v)
            return out, *pull(dout)

        row = {"section": "check", "case": f"flash, out dq dk dv, H {head_dim}", "impl": ops.name}
        yield _difference(row, *(jax.jit(partial(flash, o)) for o in (ops, plain)), q, k, v, dout)
        if time.monotonic() > deadline:
            yield {"left_out": "check: the rest"}
            return
        for page_dtype in ("bfloat16", "int8"):
            yield _check_pages(num_heads, num_kv_heads, head_dim, page_dtype)


def _check_pages(num_heads: int, num_kv_heads: int, head_dim: int, page_dtype: str) -> Row:
    """A mixed batch of decode rows and chunks through both implementations."""
    rows = [(1, 700), (1, 64), (1, 65), (90, 90), (33, 400)]
    size = PAGE_SIZE[platform()]
    ragged, num_pages = ragged_of(rows, size, 3)
    tokens = num_pages * size
    k, v = jax.random.normal(jax.random.key(1), (2, tokens, num_kv_heads, head_dim), jnp.bfloat16)
    shape = (ragged.slots.shape[0], num_heads, head_dim)
    q = jax.random.normal(jax.random.key(2), shape, jnp.bfloat16)

    def run(ops: Ops, q: Any, k: Any, v: Any, ragged: Ragged) -> Any:
        pages = ops.allocate(num_pages, size, num_kv_heads, head_dim, page_dtype)
        pages = ops.kv_write(pages, k, v, jnp.arange(tokens, dtype=jnp.int32))
        scale = head_dim**-0.5
        return ops.paged_attention(q, pages, ragged, scale=scale, window=None, soft_cap=None)

    ops = ours(num_heads, num_kv_heads, head_dim, page_dtype)
    row = {"section": "check", "case": f"paged, H {head_dim} {page_dtype}", "impl": ops.name}
    both = (jax.jit(partial(run, o)) for o in (ops, pallas_kernels.resolve("reference")))
    return _difference(row, *both, q, k, v, ragged)


def _difference(row: Row, run: Callable[..., Any], plain: Callable[..., Any], *args: Any) -> Row:
    try:
        pairs = zip(jax.tree.leaves(run(*args)), jax.tree.leaves(plain(*args)), strict=True)
        apart = [np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)) for a, b in pairs]
    except Exception as error:
        return row | {"note": f"cannot run: {type(error).__name__}: {error}".splitlines()[0][:200]}
    worst = [float(x.max()) for x in apart]
    return row | {"max_error": worst, "note": "max errors " + " ".join(f"{x:.4f}" for x in worst)}


def prefill(deadline: float, at: Ceilings) -> Iterator[Row]:
    """Causal flash attention, bfloat16, 16384 tokens in rows of 4k, 8k and 16k."""
    yield from _flash("prefill", 1.0, deadline, at)


def backward(deadline: float, at: Ceilings) -> Iterator[Row]:
    """Gradients alone, from what the forward pass saved."""
    yield from _flash("backward", roofline.BACKWARD, deadline, at)


def _flash(section: str, factor: float, deadline: float, at: Ceilings) -> Iterator[Row]:
    for head_dim, (num_heads, num_kv_heads) in HEADS.items():
        for length in LENGTHS:
            batch = LENGTHS[-1] // length
            case = f"{batch} x {length}, {num_heads}/{num_kv_heads}/{head_dim} causal"
            heads = (num_heads, num_kv_heads, head_dim)
            args = flash_inputs(batch, length, *heads)
            flops = factor * roofline.attention_flops(
                num_heads, head_dim, [length] * batch, [length] * batch
            )
            moved = sum(x.nbytes for x in args[:3]) + args[0].nbytes
            ops = ours(*heads)
            peers: dict[str, Callable[..., Any]] = {ops.name: ops.flash_attention}
            peers["cudnn"] = kernels_peers.cudnn
            if length == LENGTHS[0]:
                peers["xla"] = pallas_kernels.resolve("xla").flash_attention
            for name, attend in peers.items():
                row = {"section": section, "case": case, "impl": name}
                if time.monotonic() > deadline:
                    yield {"left_out": f"{section} {case} {name}"}
                    continue
                work = partial(flash_seconds, attend, args, section == "backward")
                yield timed(row, work, flops, moved, at)
            for name, seconds in kernels_peers.flash_peers(section, head_dim):
                if time.monotonic() > deadline:
                    yield {"left_out": f"{section} {case} {name}"}
                    continue
                row = {"section": section, "case": case, "impl": name}
                yield timed(row, partial(seconds, args), flops, moved, at)


def flash_inputs(batch: int, length: int, num_heads: int, num_kv_heads: int, head_dim: int) -> Any:
    """q, k, v and the gradient of the output: N(0, 1), bfloat16."""
    keys = jax.random.split(jax.random.key(length), 4)
    counts = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    return tuple(
        jax.random.normal(key, (batch, length, n, head_dim), jnp.bfloat16)
        for key, n in zip(keys, counts, strict=True)
    )


def flash_seconds(attend: Callable[..., Any], args: Any, is_backward: bool, guess: float) -> float:
    """Device time of one causal call, or of its backward pass alone."""
    q, k, v, dout = args
    if not is_backward:
        forward = lambda q, kv, i: attend(q, *kv, causal=True)  # noqa: E731
        return device_time.seconds_per_call(forward, q, (k, v), guess)
    _, pull = jax.jit(lambda *x: jax.vjp(partial(attend, causal=True), *x))(q, k, v)
    return device_time.seconds_per_call(lambda dout, pull, i: pull(dout), dout, pull, guess)


# -- pages


def ragged_of(
    rows: list[tuple[int, int]], page_size: int, num_decode: int, num_pages: int | None = None
) -> tuple[Ragged, int]:
    """The batch of `rows` (new tokens, length) on shuffled pages, and the pages of its pool."""
    need = [-(-length // page_size) for _, length in rows]
    count = num_pages or sum(need) + 1
    ids = np.random.default_rng(0).permutation(np.arange(1, count))
    table = np.zeros((len(rows), max(need)), np.int32)
    for i, n in enumerate(need):
        table[i, :n], ids = ids[:n], ids[n:]
    news = np.array([new for new, _ in rows])
    decode_only = num_decode == len(rows)
    return Ragged(
        page_table=jnp.asarray(table),
        kv_lens=jnp.asarray([length for _, length in rows], jnp.int32),
        cu_q_lens=jnp.asarray(np.concatenate([[0], np.cumsum(news)]), jnp.int32),
        num_decode=jnp.int32(num_decode),
        slots=jnp.zeros(int(news.sum()), jnp.int32),
        decode_only=decode_only,
    ), count


def filled_pool(ops: Ops, num_pages: int, heads: tuple[int, int, int], page_dtype: str) -> Any:
    """A pool of random K and V, written through the operations."""
    _, num_kv_heads, head_dim = heads
    size, chunk = PAGE_SIZE[platform()], 64
    shape = (2, chunk * size, num_kv_heads, head_dim)

    def fill(pages: Any) -> Any:
        def body(i: jax.Array, pages: Any) -> Any:
            k, v = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), shape, jnp.bfloat16)
            slots = i * (chunk * size) + jnp.arange(chunk * size, dtype=jnp.int32)
            return ops.kv_write(pages, k, v, slots)

        return jax.lax.fori_loop(0, -(-num_pages // chunk), body, pages)

    make = partial(ops.allocate, num_pages, size, num_kv_heads, head_dim, page_dtype)
    return jax.jit(fill, donate_argnums=0)(jax.jit(make)())


def attend_seconds(
    ops: Ops, pages: Any, ragged: Ragged, heads: Any, copies: int, guess: float
) -> float:
    """Device time of one call; each call reads another of `copies` places of the pool."""
    num_heads, _, head_dim = heads
    shape = (ragged.slots.shape[0], num_heads, head_dim)
    q = jax.random.normal(jax.random.key(3), shape, jnp.bfloat16)
    stride = int(jnp.max(ragged.page_table))

    def step(q: jax.Array, fixed: Any, i: jax.Array) -> jax.Array:
        pages, ragged = fixed
        moved = replace(ragged, page_table=ragged.page_table + i % copies * stride)
        scale = head_dim**-0.5
        return ops.paged_attention(q, pages, moved, scale=scale, window=None, soft_cap=None)

    return device_time.seconds_per_call(step, q, (pages, ragged), guess)


def decode(deadline: float, at: Ceilings) -> Iterator[Row]:
    """Decode rows of Llama-3-8B heads over a pool of bfloat16, then int8 pages."""
    heads = (32, 8, 128)
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 16 << 30)
    begun = time.monotonic()
    for i, page_dtype in enumerate(("bfloat16", "int8")):
        end = begun + (deadline - begun) * (0.5 if i == 0 else 1.0)
        ops = ours(*heads, page_dtype)
        size = PAGE_SIZE[platform()]
        page_bytes = ops.page_bytes(size, *heads[1:], page_dtype)
        # The largest batch at the longest context, or what fits beside what XLA needs.
        wanted = BATCHES[-1] * CONTEXTS[-1] // size + 1
        num_pages = min(wanted, int(memory * 0.6) // page_bytes)
        pages = filled_pool(ops, num_pages, heads, page_dtype)
        for context in reversed(CONTEXTS):
            for batch in reversed(BATCHES):
                case = f"{batch} x {context}, 32/8/128 {page_dtype}"
                need = batch * (context // size)
                if need >= num_pages:
                    yield {"left_out": f"decode {case}: does not fit in memory"}
                    continue
                if time.monotonic() > end:
                    yield {"left_out": f"decode {case}"}
                    continue
                ragged, _ = ragged_of([(1, context)] * batch, size, batch, need + 1)
                moved = roofline.page_bytes_read(*heads[1:], page_dtype, batch * context)
                copies = max(1, min((num_pages - 1) // need, -(-POOL_BYTES // moved)))
                row = {"section": "decode", "case": case, "impl": ops.name}
                work = partial(attend_seconds, ops, pages, ragged, heads, copies)
                yield timed(row, work, 0.0, moved, at)
        del pages
    yield from _decode_peers(heads, deadline, at)


def _decode_peers(heads: tuple[int, int, int], deadline: float, at: Ceilings) -> Iterator[Row]:
    """What else there is, at two sizes."""
    for batch, context in PEER_DECODE:
        moved = roofline.page_bytes_read(*heads[1:], "bfloat16", batch * context)
        for name, seconds in (("jax triton", kernels_peers.triton_paged), ("xla", xla_paged)):
            case = f"{batch} x {context}, 32/8/128 bfloat16"
            if time.monotonic() > deadline:
                yield {"left_out": f"decode {case} {name}"}
                continue
            row = {"section": "decode", "case": case, "impl": name}
            work = partial(seconds, batch, context, *heads, PAGE_SIZE[platform()])
            yield timed(row, work, 0.0, moved, at)


def xla_paged(
    batch: int,
    context: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    guess: float,
) -> float:
    """Our XLA form, as the engine would run it without a kernel."""
    ops, heads = pallas_kernels.resolve("xla"), (num_heads, num_kv_heads, head_dim)
    ragged, count = ragged_of([(1, context)] * batch, page_size, batch)
    pages = filled_pool(ops, count, heads, "bfloat16")
    return attend_seconds(ops, pages, ragged, heads, 1, guess)


def paged_prefill(deadline: float, at: Ceilings) -> Iterator[Row]:
    """Chunks of prompts, and a step of decode rows and chunks, over bfloat16 and int8 pages."""
    heads, size = (32, 8, 128), PAGE_SIZE[platform()]
    for page_dtype in ("bfloat16", "int8"):
        ops = ours(*heads, page_dtype)
        pages = filled_pool(ops, POOL_PAGES, heads, page_dtype)
        for label, rows in CHUNKS.items():
            case = f"{label}, 32/8/128 {page_dtype}"
            if time.monotonic() > deadline:
                yield {"left_out": f"paged_prefill {case}"}
                continue
            num_decode = sum(new == 1 for new, _ in rows)
            ragged, count = ragged_of(rows, size, num_decode)
            news, lengths = [n for n, _ in rows], [n for _, n in rows]
            flops = roofline.attention_flops(32, 128, news, lengths)
            moved = roofline.page_bytes_read(8, 128, page_dtype, sum(lengths))
            row = {"section": "paged_prefill", "case": case, "impl": ops.name}
            copies = max(1, (POOL_PAGES - 1) // count)
            work = partial(attend_seconds, ops, pages, ragged, heads, copies)
            yield timed(row, work, flops, moved, at)


SECTIONS: dict[str, Callable[[float, Ceilings], Iterator[Row]]] = {
    "ceilings": ceilings,
    "check": check,
    "decode": decode,
    "prefill": prefill,
    "backward": backward,
    "paged_prefill": paged_prefill,
    "quant": partial(kernels_quant.quant, timed=timed, difference=_difference),
}
