"""Pools: allocate, page_bytes, kv_write and copy_pages of every implementation; in place."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import Ops, Ragged, Spec
from pallas_kernels.common import PAGE_DTYPES, QUANTISED, quantise
from tests.kernels.cases import need, run, write

P, SIZE, K, H = 6, 8, 2, 16


def allocate(ops: Ops, dtype: str) -> Any:
    need(ops, Spec(K, K, H, SIZE, "float32", dtype))
    return ops.allocate(P, SIZE, K, H, dtype)


def read(ops: Ops, pages: object) -> np.ndarray:
    """V of every slot, `[slots, K, H]`: with a window of 1 it is what paged_attention gives."""
    slots = np.arange(P * SIZE)
    ragged = Ragged(
        page_table=jnp.asarray(slots[:, None] // SIZE, jnp.int32),
        kv_lens=jnp.asarray(slots % SIZE + 1, jnp.int32),
        cu_q_lens=jnp.arange(len(slots) + 1, dtype=jnp.int32),
        num_decode=jnp.int32(len(slots)),
        slots=jnp.zeros(len(slots), jnp.int32),
        decode_only=True,
    )
    q = jnp.ones((len(slots), K, H))
    return np.asarray(run(ops, q, pages, ragged, 1.0, 1, None))


def draw(num_tokens: int, dtype: str = "float32") -> tuple[jax.Array, jax.Array]:
    k, v = jax.random.normal(jax.random.key(num_tokens), (2, num_tokens, K, H))
    return k.astype(dtype), v.astype(dtype)


def held(x: jax.Array, dtype: str) -> np.ndarray:
    """float32 `x` as pages of `dtype` hold it."""
    if dtype not in QUANTISED:
        return np.asarray(x.astype(dtype).astype(jnp.float32))
    data, scale = quantise(x, dtype)
    return np.asarray(data.astype(jnp.float32) * scale[..., None])


@pytest.mark.parametrize("dtype", PAGE_DTYPES)
def test_each_token_lands_in_its_slot_and_nowhere_else(ops: Ops, dtype: str):
    slots = np.random.default_rng(0).permutation(P * SIZE)[:20]
    k, v = draw(20)
    pages = write(ops, allocate(ops, dtype), k, v, jnp.asarray(slots, jnp.int32))
    expected = np.zeros((P * SIZE, K, H), np.float32)
    expected[slots] = held(v, dtype)
    assert np.array_equal(read(ops, pages), expected)


@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn"])
def test_slots_outside_the_pool_are_not_written(ops: Ops, dtype: str):
    k, v = draw(5)
    slots = jnp.asarray([-1, P * SIZE, 2**31 - 1, -(2**31), 9], jnp.int32)
    out = read(ops, write(ops, allocate(ops, dtype), k, v, slots))
    assert np.array_equal(out[9], held(v[4], dtype))
    assert np.count_nonzero(out.any(axis=(1, 2))) == 1


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("where", [(3, 0, 5), (600, 1, 0)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_quantised_away(dtype: str, where: tuple[int, ...], bad: float):
    x = np.random.default_rng(0).standard_normal((700, K, 64)).astype(np.float32)
    x[where] = bad
    for compiled in (quantise, jax.jit(quantise, static_argnums=1)):
        _, scale = compiled(jnp.asarray(x), dtype)
        assert list(zip(*np.nonzero(~np.isfinite(scale)), strict=True)) == [where[:2]]


@pytest.mark.parametrize("dtype", QUANTISED)
def test_quantise_is_symmetric_with_one_scale_for_each_vector(dtype: str):
    """Against float64: the scale to float32's last bits, the data the nearest there is."""
    x = np.random.default_rng(0).standard_normal((50, K, 64)).astype(np.float32)
    x[0], x[1], x[2] = 0.0, x[1] * 1e30, x[2] * 1e-30
    data, scale = (np.asarray(y) for y in quantise(jnp.asarray(x), dtype))
    largest = QUANTISED[dtype]
    exact = np.abs(x.astype(np.float64)).max(axis=-1) / largest
    assert scale.dtype == np.float32 and np.allclose(scale, exact, rtol=2.0**-22, atol=0)
    y = x.astype(np.float64) / np.where(scale == 0, 1, scale)[..., None]
    holds = np.arange(256, dtype=np.uint8).view(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    holds = holds.astype(np.float64)
    nearest = np.abs(holds[np.abs(holds) <= largest] - y[..., None]).min(axis=-1)
    data = data.astype(np.float64)
    assert np.all(np.abs(data - y) <= nearest + 1e-6 * np.abs(y))
    assert np.all(np.abs(data).max(axis=-1)[1:] == largest)
    assert np.array_equal(-data, quantise(-jnp.asarray(x), dtype)[0].astype(jnp.float32))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_copy_pages_reads_before_it_writes(ops: Ops, dtype: str):
    """A chain 1 -> 2 -> 3, one source for two pages, and padding pairs (0, 0)."""
    k, v = draw(P * SIZE)
    slots = jnp.arange(P * SIZE, dtype=jnp.int32)
    pages = write(ops, allocate(ops, dtype), k, v, slots)
    src = jnp.asarray([1, 2, 1, 0, 0], jnp.int32)
    dst = jnp.asarray([2, 3, 5, 0, 0], jnp.int32)
    out = read(ops, ops.copy_pages(pages, src, dst)).reshape(P, SIZE, K, H)
    before = held(v, dtype).reshape(P, SIZE, K, H)
    assert np.array_equal(out, before[[0, 1, 1, 2, 4, 1]])


def test_copies_from_and_to_pages_outside_the_pool(ops: Ops):
    """A source is clipped into the pool, a destination outside is no page."""
    k, v = draw(P * SIZE)
    slots = jnp.arange(P * SIZE, dtype=jnp.int32)
    pages = write(ops, ops.allocate(P, SIZE, K, H, "float32"), k, v, slots)
    src = jnp.asarray([-1, 2**31 - 1, 3, 3, 3], jnp.int32)
    dst = jnp.asarray([1, 2, -1, P, -(2**31)], jnp.int32)
    out = read(ops, ops.copy_pages(pages, src, dst)).reshape(P, SIZE, K, H)
    before = np.asarray(v).reshape(P, SIZE, K, H)
    assert np.array_equal(out, before[[0, 0, P - 1, 3, 4, 5]])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_copy_pages_copies_keys_too(ops: Ops, dtype: str):
    k, v = draw(2 * SIZE)
    pages = allocate(ops, dtype)
    pages = write(ops, pages, k, v, jnp.arange(SIZE, 3 * SIZE, dtype=jnp.int32))
    pages = ops.copy_pages(pages, jnp.asarray([1, 2], jnp.int32), jnp.asarray([4, 3], jnp.int32))
    q = jnp.broadcast_to(jax.random.normal(jax.random.key(5), (1, K, H)), (2, K, H))
    ragged = Ragged(
        page_table=jnp.asarray([[1, 2], [4, 3]], jnp.int32),
        kv_lens=jnp.asarray([13, 13], jnp.int32),
        cu_q_lens=jnp.arange(3, dtype=jnp.int32),
        num_decode=jnp.int32(2),
        slots=jnp.zeros(2, jnp.int32),
        decode_only=True,
    )
    out = np.asarray(run(ops, q, pages, ragged, 1.0, None, None))
    assert np.array_equal(out[0], out[1])
    assert not np.array_equal(out[0], np.asarray(v[:13]).mean(axis=0))


@pytest.mark.parametrize("dtype", PAGE_DTYPES)
@pytest.mark.parametrize("page_size", [8, 16, 128])
def test_page_bytes_is_what_allocate_takes(ops: Ops, dtype: str, page_size: int):
    need(ops, Spec(3, 3, 64, page_size, "float32", dtype))
    pages = ops.allocate(5, page_size, 3, 64, dtype)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(pages))
    assert total == 5 * ops.page_bytes(page_size, 3, 64, dtype)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(pages))


def _ragged(decode_only: bool) -> Ragged:
    return Ragged(
        page_table=jnp.ones((4, 8), jnp.int32),
        kv_lens=jnp.full(4, 9, jnp.int32),
        cu_q_lens=jnp.arange(5, dtype=jnp.int32),
        num_decode=jnp.int32(4),
        slots=jnp.arange(16, 20, dtype=jnp.int32),
        decode_only=decode_only,
    )


@pytest.mark.parametrize(
    ("dtype", "decode_only"),
    [
        ("float32", True),
        ("bfloat16", False),
        ("float16", True),
        ("int8", False),
        ("float8_e4m3fn", True),
    ],
)
def test_a_donated_step_writes_in_place(ops: Ops, dtype: str, decode_only: bool):
    """copy, write and attend in one program: the pool is aliased, no temporary is near its size."""
    if ops.name != "xla" and dtype in ("bfloat16", "float8_e4m3fn"):
        pytest.skip("documented: XLA:CPU copies a token-major pool of this dtype")
    need(ops, Spec(2 * K, K, H, 16, "float32", dtype))
    pages = ops.allocate(4096, 16, K, H, dtype)
    k, v = draw(4)
    pairs = jnp.zeros(2, jnp.int32)

    def step(pages, q, k, v, ragged):
        pages = ops.copy_pages(pages, pairs, pairs)
        pages = ops.kv_write(pages, k, v, ragged.slots)
        out = ops.paged_attention(q, pages, ragged, scale=1.0, window=None, soft_cap=None)
        return out, pages

    q = jnp.ones((4, 2 * K, H))
    compiled = jax.jit(step, donate_argnums=0).lower(pages, q, k, v, _ragged(decode_only)).compile()
    pool = sum(leaf.nbytes for leaf in jax.tree.leaves(pages))
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    assert memory.alias_size_in_bytes == pool
    assert memory.temp_size_in_bytes < pool // 8
    whole = [f"[{','.join(map(str, leaf.shape))}]" for leaf in jax.tree.leaves(pages)]
    copies = [line for line in text.splitlines() if " copy(" in line]
    assert not [line for line in copies if any(shape in line for shape in whole)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_pages": 0}, "num_pages is 0; it must be an int >= 1"),
        ({"num_pages": 2**29}, "slots are int32, so at most 268435455 pages"),
        ({"page_size": 2.5}, "page_size is 2.5"),
        ({"num_kv_heads": -1}, "num_kv_heads is -1"),
        ({"head_dim": True}, "head_dim is True"),
        ({"dtype": "int4"}, "dtype is int4; allowed: float32, bfloat16, float16, int8, float8_e4"),
        ({"dtype": "nonsense"}, "dtype is nonsense; allowed"),
    ],
)
def test_bad_pools_are_refused(ops: Ops, change: dict, message: str):
    good = {"num_pages": 2, "page_size": 8, "num_kv_heads": 2, "head_dim": 16, "dtype": "float32"}
    arguments = {**good, **change}
    with pytest.raises(ValueError, match=message):
        ops.allocate(*arguments.values())
    if "num_pages" not in change:
        with pytest.raises(ValueError, match=message):
            ops.page_bytes(*list(arguments.values())[1:])


@pytest.mark.parametrize(
    ("k_shape", "v_shape", "slots", "message"),
    [
        ((3, K, H), (3, K, H), jnp.zeros(4, jnp.int32), r"k has shape \(3, 2, 16\).*\(4, 2, 16\)"),
        ((4, K, H), (4, K, 8), jnp.zeros(4, jnp.int32), r"v has shape \(4, 2, 8\)"),
        ((4, 1, H), (4, K, H), jnp.zeros(4, jnp.int32), r"k has shape \(4, 1, 16\)"),
        ((4, K, H), (4, K, H), jnp.zeros(4), "slots is float32; it must be int32"),
        ((4, K, H), (4, K, H), jnp.zeros((4, 1), jnp.int32), r"slots has shape \(4, 1\)"),
    ],
)
def test_bad_writes_are_refused(ops: Ops, k_shape, v_shape, slots, message: str):
    pages = allocate(ops, "float32")
    with pytest.raises(ValueError, match=message):
        ops.kv_write(pages, jnp.zeros(k_shape), jnp.zeros(v_shape), slots)


def test_bad_copies_are_refused(ops: Ops):
    pages = allocate(ops, "float32")
    one, two = jnp.zeros(1, jnp.int32), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=r"dst has shape \(2,\); it must be \[C\] = \(1\)"):
        ops.copy_pages(pages, one, two)
    with pytest.raises(ValueError, match="src is float32"):
        ops.copy_pages(pages, jnp.zeros(1), one)
